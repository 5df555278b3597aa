"""BoTorch's fits end at the same loss whether the flag is on or off."""

from __future__ import annotations

import pytest
from fits import MODELS, fit

# An optimizer follows other roundings to another point where the loss hardly rises: to these `python test/fits.py`
# gives twenty sets of data.
BRANCHING = {"MixedSingleTaskGP", "AdditiveMapSaasSingleTaskGP", "KroneckerMultiTaskGP"}


@pytest.mark.parametrize("name", sorted(MODELS.keys() - BRANCHING))
def test_fits_end_at_the_same_loss(name: str) -> None:
    (off, _), (on, _) = (fit(name, n=20, seed=0, flag=flag) for flag in (False, True))
    assert on == pytest.approx(off, abs=1e-6)
