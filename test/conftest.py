"""What every test starts from."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from gpytorch.settings import use_torch_tensors


@pytest.fixture(autouse=True)
def clean_state() -> Iterator[None]:
    """The same random numbers at every run, and neither the flag nor the default dtype left changed."""
    torch.manual_seed(0)
    state, dtype = use_torch_tensors._state, torch.get_default_dtype()
    yield
    assert use_torch_tensors._state is state
    assert torch.get_default_dtype() is dtype
