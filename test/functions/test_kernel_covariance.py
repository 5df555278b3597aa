"""Kernels with a closed-form gradient, against upstream's and against a reference of more digits."""

from __future__ import annotations

import math
from collections.abc import Callable

import mpmath
import pytest
import torch
from both_ways import assert_near, compare, evaluate, inputs, routes, scatter
from torch import Tensor

from gpytorch import kernels as k
from gpytorch.closed_form import differences
from gpytorch.distributions import MultivariateNormal
from gpytorch.kernels import Kernel

NONE = torch.Size([])
LEAVES: dict[str, Callable[..., Kernel]] = {
    "rbf": k.RBFKernel,
    "matern 1/2": lambda **options: k.MaternKernel(0.5, **options),
    "matern 3/2": lambda **options: k.MaternKernel(1.5, **options),
    "matern 5/2": lambda **options: k.MaternKernel(2.5, **options),
    "rational quadratic": k.RQKernel,
    "periodic": k.PeriodicKernel,
}
SMOOTH = [name for name in LEAVES if name != "matern 1/2"]  # its slope at a distance of zero is a matter of convention

COMPOSITIONS: dict[str, Callable[[torch.Size], Kernel]] = {
    "sum of scaled": lambda b: scaled(k.RBFKernel(batch_shape=b)) + scaled(k.MaternKernel(1.5, batch_shape=b)),
    "product of scaled": lambda b: scaled(k.RBFKernel(batch_shape=b)) * scaled(k.RQKernel(batch_shape=b)),
    "scaled sum": lambda b: scaled(k.RBFKernel(batch_shape=b) + k.PeriodicKernel(batch_shape=b), b),
    "scaled product of three": lambda b: scaled(
        k.RBFKernel(batch_shape=b) * k.PeriodicKernel(batch_shape=b) * k.MaternKernel(2.5, batch_shape=b), b
    ),
    "sum of products": lambda b: (
        scaled(k.RBFKernel(batch_shape=b) * k.RQKernel(batch_shape=b), b) + k.MaternKernel(2.5, batch_shape=b)
    ),
    "product of sums": lambda b: (
        (k.RBFKernel(batch_shape=b) + k.RQKernel(batch_shape=b))
        * (scaled(k.MaternKernel(2.5, batch_shape=b)) + k.PeriodicKernel(batch_shape=b))
    ),
    "parts of the inputs": lambda b: (
        scaled(k.RBFKernel(active_dims=[0, 2], batch_shape=b))
        + scaled(k.PeriodicKernel(active_dims=[1], batch_shape=b)) * k.RQKernel(active_dims=[2, 1], batch_shape=b)
    ),
    "cosine": lambda b: scaled(k.CosineKernel(active_dims=[0], batch_shape=b)) + k.MaternKernel(1.5, batch_shape=b),
    "scale of a scale": lambda b: scaled(scaled(k.RBFKernel(batch_shape=b))),
}


def scaled(kernel: Kernel, batch: torch.Size | None = None) -> Kernel:
    return k.ScaleKernel(kernel, batch_shape=kernel.batch_shape if batch is None else batch)


def shared_twice(b: torch.Size) -> Kernel:
    kernel = scaled(k.RBFKernel(batch_shape=b))
    return kernel + kernel * k.PeriodicKernel(batch_shape=b)


COMPOSITIONS["one kernel in two places"] = shared_twice


def log_prob(kernel: Kernel, x: Tensor, noise: float = 0.1) -> Tensor:
    n = x.size(-2)
    covar = kernel(x).add_diagonal(torch.tensor([noise], dtype=x.dtype))
    y = torch.sin(7 * torch.arange(n, dtype=x.dtype))
    return MultivariateNormal(torch.zeros(covar.shape[:-1], dtype=x.dtype), covar).log_prob(y.expand(covar.shape[:-1]))


def compare_kernel(kernel: Kernel, x: Tensor, **expected) -> None:
    leaves = dict(kernel.named_parameters())
    compare(lambda: log_prob(kernel, x), {**leaves, "x": x} if x.requires_grad else leaves, **expected)


@pytest.mark.parametrize("batch", [NONE, torch.Size([2]), torch.Size([2, 3])], ids=str)
@pytest.mark.parametrize("ard", [1, 3])
@pytest.mark.parametrize("of_inputs", [False, True])
@pytest.mark.parametrize("case", LEAVES)
def test_leaf_matches_upstream(case: str, of_inputs: bool, ard: int, batch: torch.Size) -> None:
    kernel = scatter(scaled(LEAVES[case](batch_shape=batch, **({"ard_num_dims": ard} if ard > 1 else {}))).double())
    x = inputs(11, 3, batch).requires_grad_(of_inputs)
    if case == "matern 1/2" and (ard > 1 or of_inputs):
        # See test_distance_of_a_point_from_itself_is_zero.
        compare_kernel(kernel, x, rtol=1e-5)
    else:
        compare_kernel(kernel, x)


@pytest.mark.parametrize("batch", [NONE, torch.Size([2])], ids=str)
@pytest.mark.parametrize("of_inputs", [False, True])
@pytest.mark.parametrize("case", COMPOSITIONS)
def test_composition_matches_upstream(case: str, of_inputs: bool, batch: torch.Size) -> None:
    kernel = scatter(COMPOSITIONS[case](batch).double())
    compare_kernel(kernel, inputs(11, 3, batch).requires_grad_(of_inputs))


@pytest.mark.parametrize("batch", [NONE, torch.Size([2])], ids=str)
@pytest.mark.parametrize("ard", [1, 3])
@pytest.mark.parametrize("case", LEAVES)
def test_distances_from_differences_and_from_products_match_upstream(
    case: str, ard: int, batch: torch.Size, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel = scatter(scaled(LEAVES[case](batch_shape=batch, **({"ard_num_dims": ard} if ard > 1 else {}))).double())
    leaves, x = dict(kernel.named_parameters()), inputs(11, 3, batch)
    by_differences = evaluate(lambda: log_prob(kernel, x), leaves, flag=True)
    monkeypatch.setattr(differences, "FEW", 0)
    monkeypatch.setitem(differences.FEW_AGAIN, "cpu", 0)
    compare_kernel(kernel, x, **({"rtol": 1e-5} if case == "matern 1/2" and ard > 1 else {}))
    by_products = evaluate(lambda: log_prob(kernel, x), leaves, flag=True)
    assert_near(by_differences.value, by_products.value)
    for name, grad in by_differences.grads.items():
        assert_near(grad, by_products.grads[name], rtol=1e-7 if case == "matern 1/2" else 1e-9)


@pytest.mark.parametrize(
    ("kernel_batch", "scale_batch", "input_batch"),
    [((3,), (3,), ()), ((), (), (3,)), ((), (3,), ()), ((3,), (), ()), ((2, 1), (2, 1), (3,)), ((2, 1), (3,), (2, 3))],
)
@pytest.mark.parametrize("case", LEAVES)
def test_batch_shapes_broadcast_as_upstream(
    case: str, kernel_batch: tuple[int, ...], scale_batch: tuple[int, ...], input_batch: tuple[int, ...]
) -> None:
    kernel = scaled(LEAVES[case](batch_shape=torch.Size(kernel_batch)), torch.Size(scale_batch))
    compare_kernel(scatter(kernel.double()), inputs(8, 2, input_batch))


@pytest.mark.parametrize("copies", ["exact", "nearly"])
@pytest.mark.parametrize("of_inputs", [False, True])
@pytest.mark.parametrize("case", SMOOTH)
def test_repeated_points_match_upstream(case: str, of_inputs: bool, copies: str) -> None:
    x = inputs(6, 2)
    x = torch.cat([x, x, x if copies == "exact" else x + 1e-6])
    kernel = scatter(scaled(LEAVES[case](ard_num_dims=2)).double())
    # Upstream's squared distance of two equal points is a rounding error, about 1e-16, of which the Matern kernels
    # take the root.
    tolerance = {"rtol": 1e-6} if case.startswith("matern") else {}
    compare_kernel(kernel, x.requires_grad_(of_inputs), **tolerance)


@pytest.mark.parametrize("case", [*LEAVES, *COMPOSITIONS])
def test_all_points_in_one_place_have_finite_gradients(case: str) -> None:
    kernel = (COMPOSITIONS[case](NONE) if case in COMPOSITIONS else scaled(LEAVES[case](ard_num_dims=3))).double()
    x = torch.full((7, 3), 0.3, dtype=torch.float64, requires_grad=True)
    with routes(tensors=1):
        result = evaluate(lambda: log_prob(kernel, x), {**dict(kernel.named_parameters()), "x": x}, flag=True)
    assert torch.isfinite(result.value)
    for name, grad in result.grads.items():
        assert torch.isfinite(grad).all(), name
        # k(0) depends on nothing but the scales.
        assert "outputscale" in name or grad.abs().max() < 1e-6, name


@pytest.mark.parametrize("case", SMOOTH)
def test_inputs_far_from_the_origin_lose_no_digits(case: str) -> None:
    kernel = scatter(scaled(LEAVES[case]()).double())
    if case == "periodic":
        kernel.base_kernel.period_length = 1.0
    leaves = dict(kernel.named_parameters())
    near, far = (evaluate(lambda x=x: log_prob(kernel, x), leaves, flag=True) for x in (inputs(9), inputs(9) + 1024.0))
    far.assert_near(near, rtol=1e-9)


@pytest.mark.parametrize("n", [363, 400])
@pytest.mark.parametrize("case", [*SMOOTH, *COMPOSITIONS])
def test_more_rows_than_a_block_match_upstream(case: str, n: int) -> None:
    kernel = COMPOSITIONS[case](NONE) if case in COMPOSITIONS else scaled(LEAVES[case](ard_num_dims=3))
    compare_kernel(scatter(kernel.double()), inputs(n, 3))
    if n == 400 and case in ("rbf", "matern 5/2", "periodic", "product of sums"):
        compare_kernel(kernel, inputs(n, 3).requires_grad_())


@pytest.mark.parametrize("case", ["rbf", "product of sums"])
def test_batch_of_more_rows_than_a_block_matches_upstream(case: str) -> None:
    batch = torch.Size([3])
    kernel = COMPOSITIONS[case](batch) if case in COMPOSITIONS else scaled(LEAVES[case](batch_shape=batch))
    compare_kernel(scatter(kernel.double()), inputs(260, 3, batch).requires_grad_())


COMPOSED_WITH: dict[str, Callable[[Kernel], Kernel]] = {
    "alone": lambda kernel: kernel,
    "scaled": scaled,
    "sum": lambda kernel: kernel + k.RBFKernel(),
    "scaled, product": lambda kernel: scaled(kernel) * k.RQKernel(),
}


@pytest.mark.parametrize("composed", COMPOSED_WITH)
@pytest.mark.parametrize("kind", ["Halved", "OtherDistance", "Shifted", "Renamed", "DoubledLengthscale"])
def test_subclass_that_changes_the_kernel_is_not_taken_for_its_parent(kind: str, composed: str) -> None:
    class Halved(k.RBFKernel):
        def forward(self, x1: Tensor, x2: Tensor, diag: bool = False, **params) -> Tensor:
            return 0.5 * super().forward(x1, x2, diag=diag, **params)

    class OtherDistance(k.MaternKernel):
        def covar_dist(self, x1: Tensor, x2: Tensor, **params) -> Tensor:
            return (x1.unsqueeze(-2) - x2.unsqueeze(-3)).abs().sum(-1)

    class Shifted(k.RBFKernel):
        def __call__(self, x1: Tensor, x2: Tensor | None = None, **params):
            return super().__call__(x1 * 2, None if x2 is None else x2 * 2, **params)

    class Renamed(k.RBFKernel):
        """The same kernel."""

    class DoubledLengthscale(k.RBFKernel):
        @property
        def lengthscale(self) -> Tensor:
            return 2 * self.raw_lengthscale_constraint.transform(self.raw_lengthscale)

    kernel = COMPOSED_WITH[composed](locals()[kind]())
    compare_kernel(scatter(kernel.double()), inputs(9))


@pytest.mark.parametrize("case", ["matern 1/2", "matern 5/2", "rational quadratic"])
@pytest.mark.parametrize("lengthscale", [[0.6], [0.6, 1.4]], ids=str)
def test_lengthscale_of_a_subclass_may_have_one_dimension(lengthscale: list[float], case: str) -> None:
    kernel = scaled(LEAVES[case](ard_num_dims=2)).double()
    fixed = property(lambda self: torch.tensor(lengthscale, dtype=torch.float64))
    kernel.base_kernel.__class__ = type("Fixed", (type(kernel.base_kernel),), {"lengthscale": fixed})
    compare_kernel(scatter(kernel), inputs(9), rtol=1e-5 if case == "matern 1/2" else 1e-8)


def test_lengthscale_of_a_subclass_for_each_point_another_matches_upstream() -> None:
    class Local(k.RBFKernel):
        @property
        def lengthscale(self) -> Tensor:
            return 0.5 + torch.arange(9, dtype=torch.float64).unsqueeze(-1) / 9

    compare_kernel(scatter(scaled(Local()).double()), inputs(9) + 3)


@pytest.mark.parametrize("ard", [None, 2])
@pytest.mark.parametrize("case", [name for name in LEAVES if name != "periodic"])
def test_gradient_in_a_tiny_lengthscale_of_float32_is_a_number(case: str, ard: int | None) -> None:
    kernel = LEAVES[case](ard_num_dims=ard)
    with torch.no_grad():
        kernel.raw_lengthscale.fill_(-39.0)  # float32 holds the softplus of it, and the square, but not the cube
    result = evaluate(
        lambda: log_prob(kernel, inputs(9, dtype=torch.float32)), dict(kernel.named_parameters()), flag=True
    )
    assert torch.isfinite(result.grads["raw_lengthscale"]).all()


@pytest.mark.parametrize("alpha", [0.1, 20.0, 1000.0])
@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float32, 1e-3), (torch.float64, 1e-9)])
def test_rational_quadratic_of_far_points_has_its_gradient_where_powers_underflow(
    dtype: torch.dtype, rtol: float, alpha: float
) -> None:
    x, lengthscale = torch.tensor([[0.0], [1e-3], [2e-3], [1.0], [50.0]], dtype=dtype), 1e-3
    kernel = k.RQKernel().to(dtype)
    kernel.lengthscale, kernel.alpha = lengthscale, alpha
    actual = evaluate(lambda: log_prob(kernel, x), {"raw_alpha": kernel.raw_alpha}, flag=True)
    leaf = torch.tensor(alpha, dtype=torch.float64, requires_grad=True)
    ratio = ((x - x.mT).double() / kernel.lengthscale.detach().double()).square() / 2
    matrix = (1 + ratio / leaf).pow(-leaf) + 0.1 * torch.eye(5, dtype=torch.float64)
    y = torch.sin(7 * torch.arange(5, dtype=torch.float64))
    expected = torch.distributions.MultivariateNormal(torch.zeros_like(y), matrix).log_prob(y)
    expected.backward()
    torch.testing.assert_close(actual.value.double(), expected.detach(), rtol=rtol, atol=0.0)
    by_alpha = leaf.grad * torch.sigmoid(kernel.raw_alpha.detach().double())
    torch.testing.assert_close(actual.grads["raw_alpha"].double(), by_alpha, rtol=rtol, atol=1e-7)


@pytest.mark.parametrize("first", [torch.float32, torch.float64])
def test_sum_of_kernels_in_two_precisions_is_in_the_higher(first: torch.dtype) -> None:
    second = torch.float64 if first == torch.float32 else torch.float32
    kernel, x = k.RBFKernel().to(first) + k.RBFKernel().to(second), inputs(9, dtype=torch.float32)

    def value() -> Tensor:
        covar = kernel(x).add_diagonal(torch.tensor([0.1], dtype=torch.float64))
        return MultivariateNormal(torch.zeros(9, dtype=torch.float64), covar).log_prob(torch.sin(x.double().sum(-1)))

    compare(value, dict(kernel.named_parameters()), rtol=1e-6)


def test_wrong_number_of_lengthscales_is_upstreams_error() -> None:
    kernel, errors = k.RBFKernel(ard_num_dims=3).double(), []
    for flag in (False, True):
        with pytest.raises(RuntimeError) as caught:
            evaluate(lambda: log_prob(kernel, inputs(5, 2)), {}, flag)
        errors.append(str(caught.value))
    assert errors[0] == errors[1]


# Matern 1/2 with one lengthscale a dimension: upstream differentiates through the root of the squared distance, which
# it computes by the quadratic expansion. The squared distance of a point from itself comes out as a rounding error, of
# which the root is up to 1e-8. Here it is zero, as it should be: nearer to a computation with 60 digits.


def with_60_digits(x: Tensor, lengthscale: Tensor, noise: float) -> tuple[mpmath.mpf, list[mpmath.mpf]]:
    """The log probability under a Matern 1/2 kernel, and its gradient in the lengthscales."""
    n, d = x.shape
    with mpmath.workdps(60):
        points = [[mpmath.mpf(value) for value in row] for row in x.tolist()]
        scales = [mpmath.mpf(value) for value in lengthscale.view(-1).tolist()]
        y = mpmath.matrix(torch.sin(7 * torch.arange(n, dtype=x.dtype)).tolist())

        def distance(i: int, j: int) -> mpmath.mpf:
            return mpmath.sqrt(sum(((a - b) / s) ** 2 for a, b, s in zip(points[i], points[j], scales, strict=True)))

        r = mpmath.matrix([[distance(i, j) for j in range(n)] for i in range(n)])
        covar = r.apply(lambda r: mpmath.exp(-r)) + mpmath.mpf(noise) * mpmath.eye(n)
        inverse = covar**-1
        alpha = inverse * y
        value = -((y.T * alpha)[0] + mpmath.log(mpmath.det(covar)) + n * mpmath.log(2 * mpmath.pi)) / 2
        grads = [mpmath.mpf(0)] * d
        for i in range(n):
            for j in range(n):
                if i != j:
                    pulled = (alpha[i] * alpha[j] - inverse[i, j]) / 2 * mpmath.exp(-r[i, j]) / r[i, j]
                    for e in range(d):
                        grads[e] += pulled * (points[i][e] - points[j][e]) ** 2 / scales[e] ** 3
        return value, grads


def test_distance_of_a_point_from_itself_is_zero() -> None:
    lengthscale = torch.tensor([[0.4, 1.3]], dtype=torch.float64, requires_grad=True)
    kernel = k.MaternKernel(0.5, ard_num_dims=2).double()
    # A parameter without a transform, so that its gradient is that of the lengthscale.
    del kernel.raw_lengthscale
    kernel.raw_lengthscale = lengthscale
    kernel.raw_lengthscale_constraint.transform = lambda value: value

    errors = {True: [], False: []}
    for seed in range(4):  # in some of them upstream's rounding error is below zero, and clamped to it
        x = inputs(12, 2, seed=seed)
        value, grads = with_60_digits(x, lengthscale.detach(), 0.1)
        for flag, of_flag in errors.items():
            result = evaluate(lambda x=x: log_prob(kernel, x, 0.1), {"lengthscale": lengthscale}, flag)
            found = [result.value.item(), *result.grads["lengthscale"][0].tolist()]
            of_flag.extend(float(abs((a - b) / b)) for a, b in zip(found, [value, *grads], strict=True))
    assert max(errors[True]) < 1e-12
    assert max(errors[False]) > 1e-10


PROFILES: dict[str, Callable[[float], float]] = {
    "rbf": lambda r: math.exp(-(r**2) / 2),
    "matern 1/2": lambda r: math.exp(-r),
    "matern 3/2": lambda r: (1 + math.sqrt(3) * r) * math.exp(-math.sqrt(3) * r),
    "matern 5/2": lambda r: (1 + math.sqrt(5) * r + 5 * r**2 / 3) * math.exp(-math.sqrt(5) * r),
    "rational quadratic": lambda r: (1 + r**2 / (2 * math.log(2))) ** -math.log(2),
    "periodic": lambda r: math.exp(-2 * math.sin(math.pi * r * math.log(2) / math.log(2)) ** 2 / math.log(2)),
}


@pytest.mark.parametrize("distance", [0.0, 1e-9, 0.3, 1.0, 7.0])
@pytest.mark.parametrize("case", LEAVES)
def test_kernel_of_two_points_is_that_of_the_textbook(case: str, distance: float) -> None:
    """With K = [[1, k], [k, 1]] + I the log probability of (1, 0) is that of a two-by-two matrix written out."""
    kernel = LEAVES[case]().double()  # every parameter is log 2
    step = distance * math.log(2)
    x = torch.tensor([[0.0], [step]], dtype=torch.float64)
    r = step / math.log(2)
    covariance = math.exp(-2 * math.sin(math.pi * r) ** 2 / math.log(2)) if case == "periodic" else PROFILES[case](r)
    determinant = 4 - covariance**2
    expected = -0.5 * (2 / determinant + math.log(determinant) + 2 * math.log(2 * math.pi))
    covar = kernel(x).add_diagonal(torch.ones(1, dtype=torch.float64))
    value = torch.tensor([1.0, 0.0], dtype=torch.float64)
    actual = evaluate(lambda: MultivariateNormal(torch.zeros(2).double(), covar).log_prob(value), {}, flag=True).value
    assert_near(actual, torch.tensor(expected, dtype=torch.float64), rtol=1e-12)
