"""What every test starts from."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch

from gpytorch import settings
from gpytorch.settings import use_torch_tensors

IN_A_PROCESS_OF_ITS_OWN = "GPYTORCH_TENSORS_TEST_ALONE"


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """Run a test marked `alone` in a process of its own, where nothing is alive or freed but what it makes itself."""
    if pyfuncitem.get_closest_marker("alone") is None or IN_A_PROCESS_OF_ITS_OWN in os.environ:
        return None
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
    test = f"{pyfuncitem.path}::{pyfuncitem.nodeid.partition('::')[2]}"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", test],
        cwd=pyfuncitem.config.rootpath,
        env=inherited | {IN_A_PROCESS_OF_ITS_OWN: "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if done.returncode:
        pytest.fail(done.stdout, pytrace=False)
    return True


@pytest.fixture(autouse=True)
def clean_state() -> Iterator[None]:
    """The same random numbers at every run, GPyTorch's own settings, neither flag nor default dtype left changed."""
    torch.manual_seed(0)
    state, dtype = use_torch_tensors._state, torch.get_default_dtype()
    lazily = settings.lazily_evaluate_kernels._state
    # Where a test imports BoTorch, BoTorch changes the defaults of these for the whole process.
    with settings.fast_computations(), settings.max_cholesky_size(800), settings.cholesky_max_tries(3):
        yield
    assert use_torch_tensors._state is state
    assert torch.get_default_dtype() is dtype
    assert settings.lazily_evaluate_kernels._state is lazily
