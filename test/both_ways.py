"""Exact GPs computed with the flag off and on: the same numbers, and which route gave them."""

from __future__ import annotations

import gc
import resource
import sys
import tracemalloc
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from gpytorch import dense, means
from gpytorch.distributions import MultivariateNormal
from gpytorch.kernels import Kernel
from gpytorch.likelihoods import GaussianLikelihood, Likelihood
from gpytorch.mlls import ExactMarginalLogLikelihood, MarginalLogLikelihood
from gpytorch.models import ExactGP
from gpytorch.settings import use_torch_tensors

RTOL = 1e-8  # of the largest element, in float64

goes_by_call = pytest.mark.skipif(
    torch.__version__ < (2, 6),
    reason="the compiler of torch 2.4 and 2.5 goes past a module's own call to its forward",
)

is_given_parts = pytest.mark.skipif(
    not hasattr(ExactGP, "_get_test_prior_mean_and_covariances"),
    reason="before GPyTorch 1.15.2 a model is always given training and test points together",
)


@contextmanager
def routes(**expected: int) -> Iterator[None]:
    """Assert how often each route is taken in the block."""
    before = Counter(dense.routes)
    yield
    taken = dict(dense.routes - before)
    assert taken == expected, f"took {taken}, not {expected}"


def assert_near(actual: Tensor, expected: Tensor, what: str = "value", rtol: float = RTOL, atol: float = 0.0) -> None:
    """Assert that two tensors agree to a share of their largest element."""
    assert actual.shape == expected.shape, f"{what}: {actual.shape} is not {expected.shape}"
    assert actual.dtype == expected.dtype, f"{what}: {actual.dtype} is not {expected.dtype}"
    if expected.numel() == 0:
        return
    assert torch.isfinite(expected).all(), f"{what}: the oracle itself is not finite"
    off = (actual - expected).abs().max().item()
    allowed = rtol * expected.abs().max().item() + atol
    assert off <= allowed, f"{what}: off by {off:.2e}, allowed {allowed:.2e}"


@dataclass
class Result:
    """A value and the gradients it leaves behind, by name."""

    value: Tensor
    grads: dict[str, Tensor | None]

    def assert_near(self, expected: Result, rtol: float = RTOL, atol: float = 0.0) -> None:
        """Assert that value and gradients agree, and that the same tensors have gradients."""
        assert_near(self.value, expected.value, rtol=rtol, atol=atol)
        # Where a gradient is zero but for rounding, its rounding is that of the terms which cancel in it.
        sizes = [grad.abs().max().item() for grad in expected.grads.values() if grad is not None and grad.numel()]
        atol += 1e-13 * max(sizes, default=0.0)
        assert self.grads.keys() == expected.grads.keys()
        for name, grad in expected.grads.items():
            assert (self.grads[name] is None) == (grad is None), name
            if grad is not None:
                assert_near(self.grads[name], grad, name, rtol, atol)

    def assert_equal(self, expected: Result) -> None:
        """Assert that value and gradients are the same to the bit."""
        assert torch.equal(self.value, expected.value)
        assert self.grads.keys() == expected.grads.keys()
        for name, grad in expected.grads.items():
            assert (self.grads[name] is None) == (grad is None), name
            assert grad is None or torch.equal(self.grads[name], grad), name


def evaluate(function: Callable[[], Tensor], leaves: dict[str, Tensor], flag: bool) -> Result:
    """Return the function's value and the gradients of a weighted sum of its elements in the leaves."""
    for leaf in leaves.values():
        leaf.grad = None
    torch.manual_seed(0)  # upstream's conjugate gradients draw probe vectors
    with use_torch_tensors(flag):
        value = function()
    weights = torch.linspace(1.0, 2.0, value.numel(), dtype=value.dtype).view(value.shape)
    if value.requires_grad:
        (value * weights).sum().backward()
    grads = {name: None if leaf.grad is None else leaf.grad.clone() for name, leaf in leaves.items()}
    return Result(value.detach(), grads)


def compare(
    function: Callable[[], Tensor],
    leaves: dict[str, Tensor],
    route: str = "tensors",
    times: int = 1,
    to_the_bit: bool | None = None,
    **tolerance,
) -> Result:
    """Assert that the flag changes neither value nor gradients, and that it takes `route` so many times.

    On upstream's route the two are the same to the bit, unless said otherwise.
    """
    with routes():
        expected = evaluate(function, leaves, flag=False)
    with routes(**{route: times}):
        actual = evaluate(function, leaves, flag=True)
    if route == "upstream" if to_the_bit is None else to_the_bit:
        actual.assert_equal(expected)
    else:
        actual.assert_near(expected, **tolerance)
    return actual


def both(function: Callable[[], list[Tensor]], model: ExactGP | None = None, rtol: float = RTOL) -> None:
    """Assert that the flag changes nothing that `function` returns, on a model with nothing cached."""
    results = []
    for flag in (False, True):
        if model is not None:
            model.prediction_strategy = None
        torch.manual_seed(0)
        with use_torch_tensors(flag):
            results.append(function())
    for i, (expected, actual) in enumerate(zip(*results, strict=True)):
        assert_near(actual.detach(), expected.detach(), str(i), rtol, atol=1e-11)


class GP(ExactGP):
    """An exact GP of any kernel and mean."""

    def __init__(self, x: Tensor, y: Tensor, kernel: Kernel, likelihood: Likelihood, mean: means.Mean | None = None):
        super().__init__(x, y, likelihood)
        self.mean_module = means.ConstantMean() if mean is None else mean
        self.covar_module = kernel

    def forward(self, x: Tensor) -> MultivariateNormal:
        return MultivariateNormal(self.mean_module(x), self.covar_module(x))


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def scatter(module: torch.nn.Module, seed: int = 0, scale: float = 0.3) -> torch.nn.Module:
    """Move every parameter off its default, so that no two are alike by chance."""
    rng = generator(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(scale * torch.randn(parameter.shape, generator=rng, dtype=parameter.dtype))
    return module


def inputs(n: int, d: int = 2, batch: Sequence[int] = (), seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.rand(*batch, n, d, generator=generator(seed), dtype=torch.float64).to(dtype)


def targets(x: Tensor, seed: int = 1) -> Tensor:
    noise = torch.randn(x.shape[:-1], generator=generator(seed), dtype=torch.float64)
    return (torch.sin(5 * x.double().sum(-1)) + 0.3 * noise).to(x.dtype)


def exact_gp(
    kernel: Kernel,
    x: Tensor,
    y: Tensor | None = None,
    likelihood: Likelihood | None = None,
    mean: means.Mean | None = None,
    mll: type[MarginalLogLikelihood] = ExactMarginalLogLikelihood,
) -> MarginalLogLikelihood:
    """Return the marginal log likelihood of an exact GP whose parameters are off their defaults."""
    y = targets(x) if y is None else y
    likelihood = GaussianLikelihood() if likelihood is None else likelihood
    model = GP(x, y, kernel, likelihood, mean).to(x.dtype)
    return scatter(mll(likelihood, model)).train()


def loss(mll: MarginalLogLikelihood, *params) -> Tensor:
    """Return what a training step minimizes, for each batch."""
    model = mll.model
    return -mll(model(*model.train_inputs), model.train_targets, *params)


def compare_step(mll: MarginalLogLikelihood, *params, leaves: dict[str, Tensor] | None = None, **expected) -> Result:
    """Assert that the flag changes neither the loss nor its gradients."""
    leaves = {**dict(mll.named_parameters()), **(leaves or {})}
    return compare(lambda: loss(mll, *params), leaves, **expected)


def live_tensors() -> int:
    """How many tensors Python knows of."""
    gc.collect()
    return sum(issubclass(type(each), Tensor) for each in gc.get_objects())


def python_memory() -> tracemalloc.Snapshot:
    """What Python holds, less the names in its cache of attribute lookups: thousands, which fill over many calls."""
    gc.collect()
    clear = getattr(sys, "_clear_internal_caches", None) or sys._clear_type_cache  # the first since Python 3.13
    clear()
    return tracemalloc.take_snapshot()


def growth_of_process(work: Callable[[], object], times: int) -> float:
    """Return by how many bytes the process grows each time that `work` runs, in the best of three rounds: what the
    allocator keeps may grow in some of them, a leak grows in all."""

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()

    for _ in range(5):
        work()
    grown = []
    for _ in range(3):
        before = resident()
        for _ in range(times):
            work()
        grown.append((resident() - before) / times)
    return min(grown)


def assert_leaves_nothing_behind(work: Callable[[int], None], rounds: int, calls: int) -> None:
    """`work(calls)` again and again keeps no tensor and no memory of Python's; for tests marked `alone`."""
    work(20 if sys.version_info >= (3, 11) else 1100)  # from its 1024th call on Python 3.10 keeps more of a function
    tensors, grown = live_tensors(), []
    tracemalloc.start()
    try:
        work(20)
        for _ in range(rounds):
            before = python_memory()
            work(calls)
            assert live_tensors() == tensors
            grown.append(sum(each.size_diff for each in python_memory().compare_to(before, "filename")))
    finally:
        tracemalloc.stop()
    # What belongs to the process may grow in some of the rounds; a leak grows in all of them.
    assert min(grown) < 8 * calls
