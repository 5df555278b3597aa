"""`MultivariateNormal.log_prob` with the flag on, against upstream's."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
from both_ways import assert_near, compare, evaluate, generator, inputs, routes, scatter
from linear_operator.operators import DenseLinearOperator, DiagLinearOperator, LinearOperator
from torch import Tensor

from gpytorch import kernels as k
from gpytorch import settings
from gpytorch.distributions import MultitaskMultivariateNormal, MultivariateNormal
from gpytorch.kernels import Kernel
from gpytorch.likelihoods import GaussianLikelihood
from gpytorch.settings import use_torch_tensors

DENSE: dict[str, Callable[[torch.Size], Kernel]] = {
    "rbf": lambda b: k.RBFKernel(batch_shape=b),
    "rbf ard": lambda b: k.RBFKernel(ard_num_dims=2, batch_shape=b),
    "matern 1/2": lambda b: k.MaternKernel(0.5, batch_shape=b),
    "matern 3/2 ard": lambda b: k.MaternKernel(1.5, ard_num_dims=2, batch_shape=b),
    "matern 5/2": lambda b: k.MaternKernel(2.5, batch_shape=b),
    "rational quadratic": lambda b: k.RQKernel(batch_shape=b),
    "periodic": lambda b: k.PeriodicKernel(batch_shape=b),
    "periodic ard": lambda b: k.PeriodicKernel(ard_num_dims=2, batch_shape=b),
    "scaled": lambda b: k.ScaleKernel(k.RBFKernel(batch_shape=b), batch_shape=b),
    "sum": lambda b: k.ScaleKernel(k.RBFKernel(batch_shape=b), batch_shape=b) + k.MaternKernel(2.5, batch_shape=b),
    "product": lambda b: k.RBFKernel(batch_shape=b) * k.PeriodicKernel(batch_shape=b),
    "active dimensions": lambda b: k.RBFKernel(active_dims=[1], batch_shape=b) * k.RQKernel(batch_shape=b),
    "product with linear": lambda b: k.RBFKernel(batch_shape=b) * k.LinearKernel(batch_shape=b),
    "cosine": lambda b: k.CosineKernel(active_dims=[0], batch_shape=b),
    "polynomial": lambda b: k.PolynomialKernel(2, batch_shape=b),
    "piecewise polynomial": lambda b: k.PiecewisePolynomialKernel(q=2, batch_shape=b),
    "constant": lambda b: k.ConstantKernel(batch_shape=b),
    "spectral mixture": lambda b: k.SpectralMixtureKernel(3, ard_num_dims=2, batch_shape=b),
    "arc": lambda b: k.ArcKernel(k.MaternKernel(2.5, batch_shape=b), ard_num_dims=2, batch_shape=b),
    "cylindrical": lambda b: k.CylindricalKernel(3, k.MaternKernel(2.5, batch_shape=b), batch_shape=b),
    "hamming": lambda b: k.HammingIMQKernel(vocab_size=2, batch_shape=b),
    "distributions": lambda b: k.GaussianSymmetrizedKLKernel(batch_shape=b),
    "additive": lambda b: k.NewtonGirardAdditiveKernel(k.RBFKernel(batch_shape=b), 2),
    "additive structure": lambda b: k.AdditiveStructureKernel(k.RBFKernel(batch_shape=b), 2),
    "product structure": lambda b: k.ProductStructureKernel(k.RBFKernel(batch_shape=b), 2),
    "sum with linear": lambda b: k.RBFKernel(batch_shape=b) + k.LinearKernel(batch_shape=b),
    "product of linears": lambda b: k.LinearKernel(batch_shape=b) * k.LinearKernel(active_dims=[0], batch_shape=b),
    "rbf and gradient": lambda b: k.RBFKernelGrad(batch_shape=b),
    "rbf and two gradients": lambda b: k.RBFKernelGradGrad(batch_shape=b),
    "matern and gradient": lambda b: k.Matern52KernelGrad(batch_shape=b),
    "polynomial and gradient": lambda b: k.PolynomialKernelGrad(2, batch_shape=b),
}

FLOAT32 = ["rbf", "rbf ard", "matern 1/2", "matern 3/2 ard", "matern 5/2", "rational quadratic", "periodic"]
FLOAT32 += ["scaled", "sum", "product", "piecewise polynomial"]

STRUCTURED: dict[str, Callable[[], Kernel]] = {
    "linear": lambda: k.LinearKernel(),
    "scaled linear": lambda: k.ScaleKernel(k.LinearKernel()),
    "random features": lambda: k.RFFKernel(4, num_dims=2),
    "spectral delta": lambda: k.SpectralDeltaKernel(num_dims=2, num_deltas=4),
    "multitask": lambda: k.MultitaskKernel(k.RBFKernel(), num_tasks=2),
    "linear coregionalization": lambda: k.LCMKernel([k.RBFKernel()], num_tasks=2),
    "inducing points": lambda: k.InducingPointKernel(k.RBFKernel(), inputs(4), GaussianLikelihood()),
    "interpolated grid": lambda: k.GridInterpolationKernel(k.RBFKernel(), grid_size=10, num_dims=2),
    "scaled interpolated grid": lambda: k.ScaleKernel(k.GridInterpolationKernel(k.RBFKernel(), 10, num_dims=2)),
}

BATCHES = [torch.Size([]), torch.Size([3]), torch.Size([2, 3])]
UNBATCHED = {"constant", "hamming"}  # upstream's own cannot be evaluated in every batch
CASES = [(case, batch) for case in DENSE for batch in BATCHES if not batch or case not in UNBATCHED]


def points(case: str, batch: torch.Size) -> Tensor:
    x = inputs(9, 2, batch) * 0.6  # inside the unit circle, for the cylindrical kernel
    return (x > 0.3).double() if case == "hamming" else x


def distribution(kernel: Kernel, x: Tensor, noise: float = 0.5, mean: Tensor | None = None) -> MultivariateNormal:
    covar = kernel(x)
    covar = covar.add_diagonal(torch.full((covar.size(-1),), noise, dtype=x.dtype))
    return MultivariateNormal(torch.zeros(covar.shape[:-1], dtype=x.dtype) if mean is None else mean, covar)


def sample(*shape: int, seed: int = 2) -> Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


def compare_log_prob(make: Callable[[], MultivariateNormal], value: Tensor, leaves: dict, **expected) -> None:
    value = value.clone().requires_grad_()
    compare(lambda: make().log_prob(value), {**leaves, "value": value}, **expected)


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize(("case", "batch"), CASES)
def test_every_dense_kernel_matches_upstream(case: str, batch: torch.Size, fast: bool) -> None:
    kernel, x = scatter(DENSE[case](batch).double()), points(case, batch)
    value = sample(*batch, kernel(x).size(-1))
    with settings.fast_computations(log_prob=fast):
        compare_log_prob(lambda: distribution(kernel, x), value, dict(kernel.named_parameters()))


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("case", STRUCTURED)
def test_structured_kernel_stays_upstream(case: str, fast: bool) -> None:
    has_dense_factor = case in ("multitask", "linear coregionalization")  # which a Kronecker product factorizes
    kernel = scatter(STRUCTURED[case]().double())
    value = sample(kernel(inputs(9)).size(-1))
    with settings.fast_computations(log_prob=fast):
        compare_log_prob(
            lambda: distribution(kernel, inputs(9)),
            value,
            dict(kernel.named_parameters()),
            route="upstream",
            to_the_bit=not has_dense_factor,
        )


SHAPES = {  # of the kernel's batch, the mean, the value
    "samples": ((), (9,), (5, 9)),
    "two dimensions of samples": ((), (9,), (4, 5, 9)),
    "samples of a batch": ((3,), (3, 9), (5, 3, 9)),
    "one value for a batch": ((3,), (3, 9), (9,)),
    "one mean for a batch": ((3,), (9,), (9,)),
    "samples of two batches": ((2, 3), (2, 3, 9), (5, 2, 3, 9)),
    "one covariance for a batch of means": ((), (3, 9), (3, 9)),
    "one covariance for samples of a batch of means": ((), (3, 9), (5, 3, 9)),
    "one covariance for a batch of one": ((1,), (3, 9), (3, 9)),
    "a batch with a dimension of one": ((2, 1), (2, 3, 9), (2, 3, 9)),
}


@pytest.mark.parametrize("closed_form", [True, False])
@pytest.mark.parametrize("case", SHAPES)
def test_value_may_have_sample_and_batch_shapes(case: str, closed_form: bool) -> None:
    batch, mean_shape, value_shape = SHAPES[case]
    kernel = (k.RBFKernel if closed_form else k.PiecewisePolynomialKernel)(batch_shape=torch.Size(batch))
    kernel = scatter(k.ScaleKernel(kernel, batch_shape=torch.Size(batch)).double())
    mean = sample(*mean_shape).requires_grad_()
    compare_log_prob(
        lambda: distribution(kernel, inputs(9), mean=mean),
        sample(*value_shape),
        {**dict(kernel.named_parameters()), "mean": mean},
    )


@pytest.mark.parametrize("closed_form", [True, False])
def test_no_samples_have_no_log_probs(closed_form: bool) -> None:
    kernel = (k.RBFKernel if closed_form else k.PiecewisePolynomialKernel)().double()
    with use_torch_tensors(), routes(tensors=1):
        res = distribution(kernel, inputs(9)).log_prob(sample(0, 9))
    assert res.shape == (0,)
    res.sum().backward()
    assert torch.equal(kernel.raw_lengthscale.grad, torch.zeros_like(kernel.raw_lengthscale))


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize(("covar_batch", "value_shape"), [((), (7,)), ((3,), (3, 7)), ((3,), (5, 3, 7)), ((), (5, 7))])
def test_tensor_covariance_matches_upstream(covar_batch: tuple, value_shape: tuple, fast: bool) -> None:
    root = sample(*covar_batch, 7, 7).requires_grad_()
    value = sample(*value_shape)

    def make() -> MultivariateNormal:
        return MultivariateNormal(torch.zeros(*covar_batch, 7).double(), root @ root.mT + torch.eye(7))

    # torch's own distribution factorizes at once, and upstream uses that factor while log_prob is not fast.
    with settings.fast_computations(log_prob=fast):
        compare_log_prob(make, value, {"root": root}, route="tensors" if fast else "upstream")


def test_factor_of_the_distribution_is_used_again() -> None:
    kernel = k.RBFKernel().double()
    with settings.fast_computations(log_prob=False), use_torch_tensors():
        drawn = distribution(kernel, inputs(9))
        expected = drawn.log_prob(sample(9))
        assert drawn._unbroadcasted_scale_tril is not None
        with routes(upstream=1):
            actual = drawn.log_prob(sample(9))
        assert_near(actual, expected, rtol=1e-12)


BAD_VALUES = {"nan": torch.full((9,), float("nan")), "too short": torch.zeros(8), "another size": torch.zeros(4, 3)}


@pytest.mark.parametrize("case", BAD_VALUES)
@pytest.mark.parametrize("validate", [True, False])
@pytest.mark.parametrize("lazy", [True, False])
@pytest.mark.parametrize("fast", [True, False])
def test_arguments_are_validated_as_by_upstream(case: str, validate: bool, lazy: bool, fast: bool) -> None:
    outcomes = []
    for flag in (False, True):
        covar = torch.eye(9, dtype=torch.float64)
        covar = DenseLinearOperator(covar) if lazy else covar
        normal = MultivariateNormal(torch.zeros(9).double(), covar, validate_args=validate)
        with use_torch_tensors(flag), settings.fast_computations(log_prob=fast):
            try:
                outcomes.append(str(normal.log_prob(BAD_VALUES[case].double())))
            except (ValueError, RuntimeError) as error:
                outcomes.append((type(error), str(error)))
    assert outcomes[0] == outcomes[1]
    if validate and not lazy:  # upstream forgets to validate where the covariance is an operator
        assert outcomes[0][0] is ValueError


def test_unvalidated_nan_gives_nan_as_upstream() -> None:
    value = torch.full((9,), float("nan"), dtype=torch.float64)
    for flag in (False, True):
        with use_torch_tensors(flag):
            assert distribution(k.RBFKernel().double(), inputs(9)).log_prob(value).isnan()


@pytest.mark.parametrize(("n", "route"), [(800, "tensors"), (801, "upstream")])
def test_size_limit_is_upstreams(n: int, route: str) -> None:
    kernel = scatter(k.ScaleKernel(k.MaternKernel(2.5, ard_num_dims=2)).double())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # conjugate gradients that have not converged
        compare_log_prob(
            lambda: distribution(kernel, inputs(n)), sample(n), dict(kernel.named_parameters()), route=route
        )


def test_without_fast_log_prob_there_is_no_size_limit() -> None:
    kernel = scatter(k.ScaleKernel(k.RBFKernel()).double())
    with settings.fast_computations(log_prob=False):
        compare_log_prob(lambda: distribution(kernel, inputs(801)), sample(801), dict(kernel.named_parameters()))


@pytest.mark.parametrize("limit", [800, 10**6])
def test_diagonal_of_200_000_stays_a_diagonal(limit: int) -> None:
    n = 200_000
    variance, value = sample(n).square() + 0.1, sample(n, seed=3)
    with settings.max_cholesky_size(limit), use_torch_tensors(), routes(upstream=1):
        actual = MultivariateNormal(torch.zeros(n).double(), DiagLinearOperator(variance)).log_prob(value)
    expected = torch.distributions.Normal(0.0, variance.sqrt()).log_prob(value).sum()
    assert_near(actual, expected, rtol=1e-12)


@pytest.mark.parametrize("value_shape", [(5, 2), (4, 5, 2)])
def test_multitask_distribution_matches_upstream(value_shape: tuple[int, ...]) -> None:
    root = sample(10, 10).requires_grad_()

    def make() -> MultivariateNormal:
        covar = DenseLinearOperator(root @ root.mT + torch.eye(10))
        return MultitaskMultivariateNormal(torch.zeros(5, 2).double(), covar)

    compare_log_prob(make, sample(*value_shape), {"root": root})


def test_expanded_and_unsqueezed_distributions_match_upstream() -> None:
    kernel = scatter(k.ScaleKernel(k.RBFKernel()).double())
    leaves = dict(kernel.named_parameters())
    compare_log_prob(lambda: distribution(kernel, inputs(9)).expand([3]), sample(3, 9), leaves)
    compare_log_prob(lambda: distribution(kernel, inputs(9)).unsqueeze(0), sample(1, 9), leaves)
    compare_log_prob(lambda: distribution(kernel, inputs(9)).add_jitter(), sample(9), leaves)


def test_many_values_cost_one_factorization(monkeypatch: pytest.MonkeyPatch) -> None:
    factorized = []
    cholesky_ex = torch.linalg.cholesky_ex
    monkeypatch.setattr(
        torch.linalg, "cholesky_ex", lambda a, **kwargs: factorized.append(a.shape) or cholesky_ex(a, **kwargs)
    )
    for kernel in (k.RBFKernel(), k.PiecewisePolynomialKernel()):
        with use_torch_tensors():
            distribution(kernel.double(), inputs(9)).log_prob(sample(50, 9)).sum().backward()
        assert factorized == [(9, 9)]
        factorized.clear()


def errors_in_float32(case: str, noise: float, seed: int, spread: float = 1.0, n: int = 60) -> tuple[Tensor, Tensor]:
    """How far value and gradients are from float64, with the flag on and off: shares of the value, of the gradient."""
    kernel = scatter(DENSE[case](torch.Size()).float(), seed)
    x, y = spread * inputs(n, seed=seed, dtype=torch.float32), sample(n, seed=seed).float()

    def results(flag: bool) -> list[Tensor]:
        dtype = next(kernel.parameters()).dtype
        mean = torch.zeros((), dtype=dtype, requires_grad=True)
        leaves = {**dict(kernel.named_parameters()), "mean": mean}
        result = evaluate(lambda: distribution(kernel, x.to(dtype), noise).log_prob(y.to(dtype) - mean), leaves, flag)
        assert result.value.dtype == dtype
        return [result.value, *result.grads.values()]

    on, off = (results(flag) for flag in (True, False))
    kernel.double()
    exact = results(flag=False)
    sizes = [exact[0].abs(), *[max(grad.norm() for grad in exact[1:])] * len(exact[1:])]
    errors = [
        [(a.double() - b).norm() / size for a, b, size in zip(each, exact, sizes, strict=True)] for each in (on, off)
    ]
    return torch.tensor(errors[0]), torch.tensor(errors[1])


def assert_no_further(errors: list[tuple[Tensor, Tensor]]) -> None:
    """The geometric mean of the errors' ratios is at most 1, but for chance: for four standard errors of its logarithm.

    One rounding error says little, and where a gradient all but vanishes it is a large share of it.
    """
    on, off = (torch.stack(each).clamp_min(1e-9).log() for each in zip(*errors, strict=True))
    ratios = on - off
    chance = 4 * ratios.std(0) / len(errors) ** 0.5
    assert (ratios.mean(0) <= chance).all(), f"{ratios.mean(0).exp().tolist()}, by chance {chance.exp().tolist()}"


@pytest.mark.parametrize("noise", [1e-1, 1e-3])
@pytest.mark.parametrize("case", FLOAT32)
def test_float32_is_no_further_from_float64_than_upstream(case: str, noise: float) -> None:
    assert_no_further([errors_in_float32(case, noise, seed) for seed in range(200)])


@pytest.mark.parametrize(("n", "num_seeds"), [(100, 40), (150, 40), (240, 40), (400, 20)])
@pytest.mark.parametrize("case", ["rbf", "rbf ard", "matern 5/2", "scaled"])
def test_float32_of_many_points_is_no_further_from_float64_than_upstream(case: str, n: int, num_seeds: int) -> None:
    assert_no_further([errors_in_float32(case, 0.1, seed, n=n) for seed in range(num_seeds)])


@pytest.mark.parametrize("case", ["rbf ard", "matern 5/2", "scaled"])
def test_float32_is_no_further_from_float64_than_upstream_among_far_points(case: str) -> None:
    on, off = zip(*[errors_in_float32(case, 0.01, seed, spread=100.0) for seed in range(20)], strict=True)
    ours, theirs = torch.stack(on).median(0).values, torch.stack(off).median(0).values
    assert (ours <= 1.5 * theirs + 1e-5).all(), f"{ours.tolist()} against {theirs.tolist()}"


def test_kernel_of_a_users_own_matches_upstream() -> None:
    class Laplace(Kernel):
        has_lengthscale = True

        def forward(self, x1: Tensor, x2: Tensor, diag: bool = False, **params) -> Tensor | LinearOperator:
            return torch.exp(-self.covar_dist(x1 / self.lengthscale, x2 / self.lengthscale, diag=diag).square())

    class Stretched(k.RBFKernel):
        def forward(self, x1: Tensor, x2: Tensor, diag: bool = False, **params) -> Tensor | LinearOperator:
            return super().forward(2 * x1, 2 * x2, diag=diag, **params)

    for kernel in (Laplace(), Stretched(), k.ScaleKernel(Stretched()), Stretched() * k.RBFKernel()):
        scatter(kernel.double())
        compare_log_prob(
            lambda kernel=kernel: distribution(kernel, inputs(9)), sample(9), dict(kernel.named_parameters())
        )
