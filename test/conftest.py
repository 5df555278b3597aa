"""What every test starts from."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from gpytorch import settings
from gpytorch.settings import use_torch_tensors


@pytest.fixture(autouse=True)
def clean_state() -> Iterator[None]:
    """The same random numbers at every run, GPyTorch's own settings, neither flag nor default dtype left changed."""
    torch.manual_seed(0)
    state, dtype = use_torch_tensors._state, torch.get_default_dtype()
    # Where a test imports BoTorch, BoTorch changes the defaults of these for the whole process.
    with settings.fast_computations(), settings.max_cholesky_size(800), settings.cholesky_max_tries(3):
        yield
    assert use_torch_tensors._state is state
    assert torch.get_default_dtype() is dtype
