"""The inverse from the Cholesky factor, on every way to it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from importlib import import_module

import pytest
import torch
from torch import Tensor

from gpytorch.functions.cholesky_inverse import cholesky_inverse_, inverse_and_solutions_


@pytest.fixture(
    params=[(number, most) for most in ((64, 256), (0, 0)) for number in (1, 2)] + [(2, None)],
    ids=["one thread of Intel's", "two threads of Intel's", "one thread", "two threads", "as on CUDA"],
)
def num_threads(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """Run on so many threads, on which, and on the processor, the way to the inverse depends.

    CUDA's way is gone by numbers of the CPU, which says that its formulas are right, and how they round.
    """
    before, (number, most) = torch.get_num_threads(), request.param
    torch.set_num_threads(number)
    module = import_module("gpytorch.functions.cholesky_inverse")
    if most is None:
        monkeypatch.setattr(Tensor, "is_cuda", property(lambda tensor: True), raising=False)
    else:
        monkeypatch.setattr(module, "_PRODUCT_UP_TO", most[0])
        monkeypatch.setattr(module, "_PRODUCT_ON_THREADS_UP_TO", most[1])
    yield number
    torch.set_num_threads(before)


def factor_of(*shape: int, dtype: torch.dtype) -> Tensor:
    """Return the Cholesky factor, in LAPACK's order, of an RBF kernel's matrix with noise."""
    x = torch.rand(*shape, 2, dtype=torch.float64)
    covar = torch.exp(-torch.cdist(x, x).square()) + 0.1 * torch.eye(shape[-1], dtype=torch.float64)
    return torch.linalg.cholesky(covar).to(dtype).mT.contiguous().mT


# Either side of the sizes at which the way changes
SIZES = [1, 2, 64, 65, 128, 129, 192, 193, 256, 257, 767, 768, 1100, 1600]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("n", SIZES)
def test_inverse_is_as_near_to_the_true_one_as_lapacks(n: int, dtype: torch.dtype, num_threads: int) -> None:
    factor = factor_of(n, dtype=dtype)
    exact, lapacks = torch.cholesky_inverse(factor.double()), torch.cholesky_inverse(factor)
    memory = factor.clone()
    inverse = cholesky_inverse_(memory)
    size, eps = exact.norm(), torch.finfo(dtype).eps
    assert inverse.data_ptr() == memory.data_ptr()
    assert (inverse.double() - exact).norm() <= 2 * (lapacks.double() - exact).norm() + 16 * eps * size
    # What goes into a gradient is a sum over the inverse, in which one-sided errors would add up.
    assert abs((inverse.double() - exact).trace()) <= 16 * eps * exact.trace()


@pytest.mark.parametrize(
    "shape", [(*batch, n) for batch in [(), (10,), (2, 5)] for n in [100, 150, 240, 400]] + [(1000,)], ids=str
)
def test_sums_over_the_inverse_are_as_exact_in_float32_as_over_lapacks(
    shape: tuple[int, ...], num_threads: int
) -> None:
    errors, n = [], shape[-1]
    for seed in range(40 // math.prod(shape[:-1]) if n < 1000 else 8):
        x = torch.rand(*shape, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        kernel = torch.exp(-torch.cdist(x, x).square())
        factor = torch.linalg.cholesky(kernel + 0.1 * torch.eye(n, dtype=torch.float64)).float().mT.contiguous().mT
        inverses = torch.cholesky_inverse(factor.double()), torch.cholesky_inverse(factor), cholesky_inverse_(factor)
        exact, lapacks, ours = ((inverse.double() * kernel).sum((-2, -1)).flatten() for inverse in inverses)
        errors.append(torch.stack([ours - exact, lapacks - exact], -1).abs() / exact.unsqueeze(-1))
    ours, lapacks = torch.cat(errors).clamp_min(1e-9).log().mean(0).exp()
    assert ours <= 2 * lapacks


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(n,) for n in SIZES] + [(3, 5), (2, 2, 20), (3, 100), (2, 257)], ids=str)
def test_solutions_come_with_the_inverse(shape: tuple[int, ...], dtype: torch.dtype, num_threads: int) -> None:
    factor = factor_of(*shape, dtype=dtype)
    rhs = torch.randn(*shape, 1, dtype=dtype)
    exact_factor, exact_rhs = factor.double(), rhs.double()
    half = torch.linalg.solve_triangular(exact_factor, exact_rhs, upper=False)
    exact = torch.cholesky_inverse(exact_factor), half, torch.cholesky_solve(exact_rhs, exact_factor)
    for part, of_part in zip(inverse_and_solutions_(factor, rhs), exact, strict=True):
        assert part.dtype is dtype
        assert (part.double() - of_part).norm() <= 1e3 * torch.finfo(dtype).eps * of_part.norm()
