"""Random exact GPs: the loss and its gradients with the flag on, against upstream's and against a float64 reference."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from both_ways import GP, Result, evaluate, generator, loss, routes, scatter
from hypothesis import HealthCheck, assume, example, given
from hypothesis import settings as trial
from hypothesis import strategies as st
from torch import Tensor

from gpytorch import kernels as k
from gpytorch import settings
from gpytorch.kernels import Kernel
from gpytorch.likelihoods import FixedNoiseGaussianLikelihood, GaussianLikelihood
from gpytorch.means import ConstantMean
from gpytorch.mlls import ExactMarginalLogLikelihood
from gpytorch.settings import use_torch_tensors

ROOT = Path(__file__).resolve().parents[1]

LEAVES: dict[str, Callable[..., Kernel]] = {
    "rbf": k.RBFKernel,
    "matern12": lambda **options: k.MaternKernel(0.5, **options),
    "matern32": lambda **options: k.MaternKernel(1.5, **options),
    "matern52": lambda **options: k.MaternKernel(2.5, **options),
    "rq": k.RQKernel,
    "periodic": k.PeriodicKernel,
    "piecewise": lambda **options: k.PiecewisePolynomialKernel(q=2, **options),
}


@dataclass(frozen=True)
class Case:
    """An exact GP, drawn."""

    kernel: tuple
    n: int
    d: int
    batch: tuple[int, ...]
    same_inputs: bool
    log_noise: float
    copies: str
    fixed_noise: bool
    seed: int


def leaf() -> st.SearchStrategy[tuple]:
    return st.tuples(st.sampled_from(sorted(LEAVES)), *[st.booleans()] * 3)


def composed(inner: st.SearchStrategy[tuple]) -> st.SearchStrategy[tuple]:
    return st.one_of(
        st.tuples(st.just("scale"), inner),
        st.tuples(st.just("sum"), inner, inner),
        st.tuples(st.just("product"), inner, inner),
    )


def cases(**fixed: st.SearchStrategy) -> st.SearchStrategy[Case]:
    drawn = {
        "kernel": st.recursive(leaf(), composed, max_leaves=4),
        "n": st.integers(1, 60),
        "d": st.integers(1, 4),
        "batch": st.sampled_from([(), (), (1,), (3,), (2, 2)]),
        "same_inputs": st.booleans(),
        "log_noise": st.floats(math.log(1e-8), math.log(10.0)),
        "copies": st.sampled_from(["none", "exact", "near"]),
        "fixed_noise": st.booleans(),
        "seed": st.integers(0, 2**16),
    }
    return st.builds(Case, **{**drawn, **fixed})


def build_kernel(spec: tuple, case: Case) -> Kernel:
    batch = torch.Size(case.batch)
    head, *rest = spec
    if head == "scale":
        return k.ScaleKernel(build_kernel(rest[0], case), batch_shape=batch)
    if head in ("sum", "product"):
        left, right = (build_kernel(each, case) for each in rest)
        return left + right if head == "sum" else left * right
    ard, part, shared = rest
    batch = torch.Size() if shared else batch
    active = list(range(0, case.d, 2)) if part else None
    dims = len(active) if active else case.d
    return LEAVES[head](batch_shape=batch, active_dims=active, **({"ard_num_dims": dims} if ard else {}))


def points(case: Case) -> tuple[Tensor, Tensor]:
    rng = generator(case.seed)
    batch = () if case.same_inputs else case.batch
    x = torch.rand(*batch, case.n, case.d, generator=rng, dtype=torch.float64)
    if case.copies != "none":  # half of the points again
        half = case.n // 2
        moved = 1e-7 * torch.randn(*batch, half, case.d, generator=rng, dtype=torch.float64)
        x[..., case.n - half :, :] = x[..., :half, :] + (moved if case.copies == "near" else 0)
    return x, torch.randn(*case.batch, case.n, generator=rng, dtype=torch.float64)


def build(case: Case, dtype: torch.dtype = torch.float64) -> ExactMarginalLogLikelihood:
    x, y = (each.to(dtype) for each in points(case))
    batch, noise = torch.Size(case.batch), math.exp(case.log_noise)
    if case.fixed_noise:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # noise below the least is raised to it
            likelihood = FixedNoiseGaussianLikelihood(torch.full_like(y, noise))
    else:
        likelihood = GaussianLikelihood(batch_shape=batch, noise_constraint=None)
        likelihood.noise_covar.raw_noise_constraint.lower_bound.fill_(0.0)
    model = GP(x, y, build_kernel(case.kernel, case), likelihood, ConstantMean(batch_shape=batch))
    mll = scatter(ExactMarginalLogLikelihood(likelihood, model), case.seed)
    if not case.fixed_noise:
        likelihood.noise = noise
    return mll.to(dtype).train()


def kinds_of(spec: tuple) -> set[str]:
    head, *rest = spec
    return {head} if head in LEAVES else {head}.union(*(kinds_of(each) for each in rest))


def is_rough(case: Case) -> bool:
    """Return whether upstream rounds the matrix to eight digits only.

    The Matern kernel of order 1/2 takes the root of a squared distance that should be zero. Kernels are multiplied by
    the roots of their matrices, and the matrix of a factor gets jitter where it is singular to rounding.
    """
    return bool(kinds_of(case.kernel) & {"matern12", "product"})


@dataclass
class Allowance:
    """How far two correct computations may be apart, from what rounding does to the matrix and its inverse."""

    value: float
    grads: float


def allowance(mll: ExactMarginalLogLikelihood, case: Case, dtype: torch.dtype = torch.float64) -> Allowance:
    mll = mll.double()
    with torch.no_grad(), use_torch_tensors(False), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of jitter in a factor of a product
        marginal = mll.likelihood(mll.model(*mll.model.train_inputs))
        covar, residual = marginal.covariance_matrix, mll.model.train_targets - marginal.mean
        eigenvalues = torch.linalg.eigvalsh(covar)
        inverse = torch.linalg.pinv(covar, hermitian=True)
    least, largest = eigenvalues.min().clamp_min(1e-300).item(), eigenvalues.max().item()
    # Elements of the matrix carry the rounding of squared distances over lengthscales of 0.2 and more.
    epsilon = torch.finfo(dtype).eps
    element = 100 * case.d * epsilon
    if is_rough(case):
        element = math.sqrt(element)
    relative = (10 * math.sqrt(case.n) * element + 10 * epsilon * largest) / least
    alpha = inverse @ residual.unsqueeze(-1)
    inv_quad = (residual.unsqueeze(-1) * alpha).sum((-2, -1)).abs().max().item()
    size = (alpha.square().sum((-2, -1)) + inverse.diagonal(dim1=-2, dim2=-1).abs().sum(-1)).max().item() / case.n
    return Allowance(relative * (1 + inv_quad / case.n), relative * (1 + size * largest))


def assert_within(actual: Result, expected: Result, allowed: Allowance) -> None:
    assert (actual.value - expected.value).abs().max() <= 1e-8 * expected.value.abs().max() + allowed.value
    assert actual.grads.keys() == expected.grads.keys()
    for name, grad in expected.grads.items():
        assert (actual.grads[name] is None) == (grad is None), name
        if grad is not None:
            assert (actual.grads[name] - grad).abs().max() <= 1e-8 * grad.abs().max() + allowed.grads, name


def outcome(mll: ExactMarginalLogLikelihood, flag: bool) -> Result | type[Exception]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of jitter, where the matrix is singular to rounding
        try:
            return evaluate(lambda: loss(mll), dict(mll.named_parameters()), flag)
        except Exception as error:
            return type(error)


def trials(count: int) -> Callable:
    slow = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
    return trial(max_examples=count, deadline=None, derandomize=True, database=None, suppress_health_check=slow)


@trials(250)
@given(case=cases())
@example(case=Case(("rbf", True, False, False), 1, 1, (), False, 0.0, "none", False, 0))
@example(case=Case(("matern52", True, False, False), 60, 4, (2, 2), False, math.log(1e-8), "exact", False, 0))
def test_step_of_a_random_model_matches_upstream(case: Case) -> None:
    mll = build(case)
    expected = outcome(mll, flag=False)
    with routes(tensors=1):
        actual = outcome(mll, flag=True)
    assume(isinstance(expected, Result))
    allowed = allowance(mll, case)
    if allowed.value > 1e-2:  # upstream's own numbers are rounding; that both or neither fail is not given either
        return
    assert isinstance(actual, Result)
    assert_within(actual, expected, allowed)


@trials(150)
@given(case=cases(log_noise=st.floats(math.log(1e-2), math.log(10.0)), copies=st.sampled_from(["none", "exact"])))
def test_step_of_a_random_well_conditioned_model_matches_to_eight_digits(case: Case) -> None:
    mll = build(case)
    expected, actual = (outcome(mll, flag) for flag in (False, True))
    assume(isinstance(expected, Result))  # upstream cannot evaluate every mixture of batched and unbatched kernels
    rtol = 2e-5 if is_rough(case) else 1e-8  # upstream's distance between copies of a point is its rounding
    actual.assert_near(expected, rtol, atol=rtol * 1e-2 * max(1.0, expected.value.abs().max().item()))


@trials(120)
@given(case=cases(log_noise=st.floats(math.log(1e-3), math.log(10.0))))
def test_random_model_in_float32_is_as_near_to_float64_as_upstream(case: Case) -> None:
    mll = build(case, torch.float32)
    with routes(tensors=1):
        on = outcome(mll, flag=True)
    off = outcome(mll, flag=False)
    mll.double()
    exact = outcome(mll, flag=False)
    assume(isinstance(exact, Result))
    allowed = allowance(mll, case, torch.float32)
    if not isinstance(on, Result) or not isinstance(off, Result):
        assert allowed.value > 1e-2
        return
    results = [(on.value, off.value, exact.value, allowed.value)]
    results += [(on.grads[name], off.grads[name], grad, allowed.grads) for name, grad in exact.grads.items()]
    for ours, theirs, reference, slack in results:
        assert ours.dtype == torch.float32
        error, upstream_error = ((each.double() - reference).abs().max().item() for each in (ours, theirs))
        assert error <= 2 * upstream_error + 0.1 * slack + 1e-5 * reference.abs().max().item()


@trials(150)
@given(
    case=cases(log_noise=st.floats(math.log(1e-2), math.log(10.0)), copies=st.sampled_from(["none", "exact"])),
    num_test=st.integers(1, 8),
    at_training_points=st.booleans(),
    fast=st.booleans(),
)
def test_posterior_of_a_random_model_matches_upstream(
    case: Case, num_test: int, at_training_points: bool, fast: bool
) -> None:
    model = build(case).eval().model
    train_x = model.train_inputs[0]
    rng = generator(case.seed + 1)
    x = torch.rand(*train_x.shape[:-2], num_test, case.d, generator=rng, dtype=torch.float64)
    if at_training_points:
        x[..., :1, :] = train_x[..., :1, :]
    draws = torch.randn(2, *case.batch, num_test, generator=rng, dtype=torch.float64)

    def posterior(flag: bool) -> list[Tensor] | type[Exception]:
        model.train().eval()  # no cache of the other way's
        leaf = x.clone().requires_grad_()
        with use_torch_tensors(flag), settings.fast_pred_var(fast), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of jitter in a factor of a product
            try:
                dist = model(leaf)
                values = [dist.mean, dist.variance, dist.covariance_matrix]
                sample = dist.add_jitter(0.1).rsample(torch.Size([2]), base_samples=draws)
            except Exception as error:
                return type(error)
            (grad,) = torch.autograd.grad(sum(value.sum() for value in values), leaf)
        return [*(value.detach() for value in values), sample.detach(), grad]

    expected = posterior(False)
    with routes(tensors=1):
        actual = posterior(True)
    assume(not isinstance(expected, type))  # upstream cannot evaluate every mixture of batched and unbatched kernels
    rtol = 1e-4 if is_rough(case) else 1e-8
    names = ["mean", "variance", "covariance", "samples", "gradient in the test points"]
    for name, ours, theirs in zip(names, actual, expected, strict=True):
        assert ours.shape == theirs.shape, name
        assert (ours - theirs).abs().max() <= rtol * max(1.0, theirs.abs().max().item()), name


@trials(60)
@given(
    case=cases(n=st.integers(2, 30), batch=st.just(()), log_noise=st.floats(math.log(1e-2), 0.0)),
    missing=st.lists(st.booleans(), min_size=30, max_size=30),
)
def test_missing_targets_are_masked_as_upstream(case: Case, missing: list[bool]) -> None:
    mll = build(case)
    gone = torch.tensor(missing[: case.n])
    gone[0] = False
    mll.model.train_targets[gone] = float("nan")
    with settings.observation_nan_policy("mask"):
        expected, actual = (outcome(mll, flag) for flag in (False, True))
    rtol = 1e-5 if is_rough(case) else 1e-8
    actual.assert_near(expected, rtol, atol=rtol * 1e-2)


@trials(60)
@given(
    case=cases(n=st.integers(1, 20), log_noise=st.floats(math.log(1e-2), 0.0)),
    samples=st.sampled_from([(), (4,), (2, 3)]),
)
def test_log_prob_of_random_samples_is_that_of_each_of_them(case: Case, samples: tuple[int, ...]) -> None:
    mll = build(case)
    with use_torch_tensors(), torch.no_grad():
        marginal = mll.likelihood(mll.model(*mll.model.train_inputs))
        values = torch.randn(*samples, *case.batch, case.n, generator=generator(case.seed), dtype=torch.float64)
        together = marginal.log_prob(values)
        apart = torch.stack([marginal.log_prob(each) for each in values.view(-1, *case.batch, case.n)])
    torch.testing.assert_close(together, apart.view(samples + case.batch), rtol=1e-9, atol=1e-9)


# What a process computes with the flag off, with and without the overlay on its path.
COMPUTE = """
import os, sys
if sys.argv[1] == "stock":
    sys.path[:] = [each for each in sys.path if not os.path.exists(os.path.join(each, "gpytorch", "_upstream.py"))]
import torch, gpytorch
from gpytorch import kernels as k, likelihoods, mlls
assert hasattr(gpytorch.settings, "use_torch_tensors") == (sys.argv[1] == "overlay")
torch.set_num_threads(1)

class GP(gpytorch.models.ExactGP):
    def __init__(self, x, y, likelihood, kernel):
        super().__init__(x, y, likelihood)
        self.mean_module, self.covar_module = gpytorch.means.ConstantMean(), kernel
    def forward(self, x):
        return gpytorch.distributions.MultivariateNormal(self.mean_module(x), self.covar_module(x))

B = torch.Size([2])
models = [
    (k.ScaleKernel(k.RBFKernel(ard_num_dims=3)), (30, 3)),
    (k.ScaleKernel(k.MaternKernel(2.5)), (30, 3)),
    (k.MaternKernel(0.5, ard_num_dims=3) + k.RQKernel(), (30, 3)),
    (k.ScaleKernel(k.PeriodicKernel()) * k.LinearKernel(), (30, 3)),
    (k.ScaleKernel(k.RBFKernel(batch_shape=B), batch_shape=B), (2, 20, 3)),
    (k.ScaleKernel(k.RBFKernel()), (900, 3)),
]
numbers = []
for dtype in (torch.float64, torch.float32):
    for kernel, shape in models:
        for kind in (mlls.ExactMarginalLogLikelihood, mlls.LeaveOneOutPseudoLikelihood):
            if kind is not mlls.ExactMarginalLogLikelihood and shape[0] == 900:
                continue
            torch.manual_seed(0)
            x = torch.rand(shape, dtype=dtype)
            y = x.sum(-1).sin()
            fixed = likelihoods.FixedNoiseGaussianLikelihood(0.1 + x[..., 0])
            for likelihood in (likelihoods.GaussianLikelihood(), fixed):
                model = GP(x, y, likelihood, kernel).to(dtype)
                mll = kind(likelihood, model).train()
                optimizer = torch.optim.Adam(mll.parameters(), lr=0.1)
                for _ in range(2):
                    optimizer.zero_grad()
                    loss = -mll(model(x), y).sum()
                    loss.backward()
                    optimizer.step()
                    numbers += [loss.detach(), *[parameter.grad.clone() for parameter in mll.parameters()]]
                mll.eval()
                prediction = model(torch.rand(*shape[:-2], 5, 3, dtype=dtype))
                numbers += [prediction.mean.detach(), prediction.variance.detach(), prediction.sample()]
torch.save(numbers, sys.argv[2])
"""


def test_flag_off_is_upstream_to_the_bit(tmp_path: Path) -> None:
    variables = {name: text for name, text in os.environ.items() if name != "GPYTORCH_USE_TORCH_TENSORS"}
    variables["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), variables.get("PYTHONPATH")]))
    results = []
    for kind in ("stock", "overlay"):
        file = tmp_path / f"{kind}.pt"
        command = [sys.executable, "-W", "ignore", "-c", COMPUTE, kind, str(file)]
        done = subprocess.run(command, cwd=tmp_path, env=variables, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        results.append(torch.load(file))
    stock, overlay = results
    assert len(stock) == len(overlay) > 100
    for theirs, ours in zip(stock, overlay, strict=True):
        assert theirs.dtype == ours.dtype
        assert torch.equal(theirs, ours)


def test_drawn_models_differ() -> None:
    """The properties would say little if the parameters of a drawn model were all alike."""
    kernel = ("sum", ("scale", ("rbf", True, False, False)), ("rq", False, False, False))
    case = Case(kernel, 5, 3, (2, 2), False, 0.0, "none", False, 3)
    values = torch.cat([parameter.detach().view(-1) for parameter in build(case).parameters()])
    assert values.unique().numel() >= values.numel() - 3  # the noises of a batch of four are set to one number


@pytest.mark.parametrize("copies", ["exact", "near"])
def test_drawn_points_repeat(copies: str) -> None:
    x, _ = points(Case(("rbf", False, False, False), 20, 2, (), False, 0.0, copies, False, 0))
    gaps = torch.cdist(x, x) + torch.eye(20)
    assert (gaps.min() == 0) == (copies == "exact")
    assert gaps.min() < 1e-6
