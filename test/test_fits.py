"""BoTorch's fits end at the same loss whether the flag is on or off."""

from __future__ import annotations

import pytest
from fits import MODELS, fit

# Where the loss is flat an optimizer follows rounding. Upstream's own fits of these models end up to 1e-5 apart if the
# targets are multiplied by 1 + 1e-15; on these data those of the others end 1e-10 apart. `python test/fits.py` compares
# both over twenty sets of data.
BRANCHING = {
    "AdditiveMapSaasSingleTaskGP",
    "KroneckerMultiTaskGP",
    "MixedSingleTaskGP",
    "MultiTaskGP",
    "SingleTaskMultiFidelityGP",
}


@pytest.mark.parametrize("name", sorted(MODELS.keys() - BRANCHING))
def test_fits_end_at_the_same_loss(name: str) -> None:
    (off, _), (on, _) = (fit(name, n=30, seed=0, flag=flag) for flag in (False, True))
    if abs(on - off) > 1e-6:
        own = max(abs(fit(name, n=30, seed=0, flag=False, nudge=nudge)[0] - off) for nudge in (1e-15, 2e-15))
        if own > 1e-6:
            pytest.skip(f"upstream's own fits end {own:.0e} apart if the targets are multiplied by 1 + 1e-15")
    assert on == pytest.approx(off, abs=1e-6)
