"""A pytest plugin: take the overlay off the path, installed or not, before anything imports GPyTorch."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path[:] = [entry for entry in sys.path if not Path(entry, "gpytorch", "_upstream.py").exists()]


def pytest_configure(config: pytest.Config) -> None:
    import gpytorch

    if hasattr(gpytorch.settings, "use_torch_tensors"):
        raise pytest.UsageError(f"{gpytorch.__file__} is under the overlay")
