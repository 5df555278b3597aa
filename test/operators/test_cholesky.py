"""`LinearOperator.cholesky`: the flag on, the same factor in LAPACK's memory; off, or for structure, upstream's."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
from both_ways import assert_near, generator, inputs
from linear_operator.operators import (
    AddedDiagLinearOperator,
    DenseLinearOperator,
    DiagLinearOperator,
    KroneckerProductLinearOperator,
    LinearOperator,
    RootLinearOperator,
    ToeplitzLinearOperator,
    TriangularLinearOperator,
)
from linear_operator.utils.errors import NanError, NotPSDError
from torch import Tensor

from gpytorch import kernels as k
from gpytorch.distributions import MultivariateNormal
from gpytorch.settings import use_torch_tensors

N = 6


def spd(*batch: int, n: int = N) -> Tensor:
    root = torch.randn(*batch, n, n, generator=generator(), dtype=torch.float64)
    return root @ root.mT / n + torch.eye(n, dtype=torch.float64)


DENSE: dict[str, Callable[[], LinearOperator]] = {
    "dense": lambda: DenseLinearOperator(spd()),
    "batch": lambda: DenseLinearOperator(spd(3, 2)),
    "added diagonal": lambda: AddedDiagLinearOperator(
        DenseLinearOperator(spd()), DiagLinearOperator(torch.ones(N, dtype=torch.float64))
    ),
    "sum": lambda: DenseLinearOperator(spd()) + DenseLinearOperator(spd()),
    "kernel": lambda: k.ScaleKernel(k.RBFKernel()).double()(inputs(N)).add_jitter(0.1),
}
STRUCTURED: dict[str, Callable[[], LinearOperator]] = {
    "diagonal": lambda: DiagLinearOperator(torch.arange(1.0, 4.0, dtype=torch.float64)),
    "Toeplitz": lambda: ToeplitzLinearOperator(torch.tensor([3.0, 1.0, 0.5, 0.1], dtype=torch.float64)),
    "root": lambda: RootLinearOperator(spd()),
    "one number": lambda: DenseLinearOperator(spd(n=1)),
}


def factors(operator: Callable[[], LinearOperator], upper: bool = False) -> tuple[Tensor, Tensor]:
    """Return the factor with the flag off and on."""
    found = []
    for flag in (False, True):
        with use_torch_tensors(flag), torch.no_grad():
            found.append(operator().cholesky(upper=upper).to_dense())
    return found[0], found[1]


@pytest.mark.parametrize("upper", [False, True])
@pytest.mark.parametrize("case", DENSE)
def test_factor_of_a_dense_operator_is_the_same_and_is_not_copied(case: str, upper: bool) -> None:
    off, on = factors(DENSE[case], upper)
    assert torch.equal(on, off)
    assert (off.mT if upper else off).is_contiguous()  # upstream's
    assert (on if upper else on.mT).is_contiguous()  # LAPACK's


@pytest.mark.parametrize("case", STRUCTURED)
def test_factor_of_a_structured_operator_is_upstreams(case: str) -> None:
    off, on = factors(STRUCTURED[case])
    assert torch.equal(on, off)
    assert on.stride() == off.stride()


def test_factors_in_a_kronecker_product_are_not_copied_either() -> None:
    off, on = factors(lambda: KroneckerProductLinearOperator(DenseLinearOperator(spd()), DenseLinearOperator(spd(n=2))))
    assert_near(on, off)


@pytest.mark.parametrize("case", DENSE)
def test_what_is_made_of_the_factor_matches_upstream(case: str) -> None:
    found = []
    for flag in (False, True):
        leaf = DENSE[case]().to_dense().detach().requires_grad_()
        with use_torch_tensors(flag):
            factor = DenseLinearOperator(leaf).cholesky()
            rhs = inputs(N, 3)
            values = [factor.solve(rhs), factor.mT.solve(rhs), factor @ rhs, factor.diagonal().log().sum(-1)]
            normal = MultivariateNormal(leaf[..., 0], DenseLinearOperator(leaf))
            values.append(normal.rsample(base_samples=inputs(N, 2, leaf.shape[:-2]).movedim(-1, 0)))
            grads = [torch.autograd.grad(value.square().sum(), leaf, retain_graph=True)[0] for value in values]
        found.append([part.detach() for part in (*values, *grads)])
    for off, on in zip(*found, strict=True):
        assert_near(on, off)


@pytest.mark.parametrize(
    ("matrix", "error"),
    [(torch.full((2, 2), torch.nan), NanError), (-torch.eye(2), NotPSDError), (torch.ones(2, 2), None)],
)
def test_warnings_and_errors_are_upstreams(matrix: Tensor, error: type[Exception] | None) -> None:
    said = []
    for flag in (False, True):
        with use_torch_tensors(flag), warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            if error is None:
                said.append(DenseLinearOperator(matrix).cholesky().to_dense().tolist())
            else:
                with pytest.raises(error) as raised:
                    DenseLinearOperator(matrix).cholesky()
                said.append(str(raised.value))
            said[-1] = (said[-1], [str(warning.message) for warning in caught])
    assert said[0] == said[1]


@pytest.mark.parametrize(
    ("batch", "shape"),  # upstream has no gradient of a batch of factors by one vector
    [((), (N, 3)), ((), (4, N, 3)), ((), (N,)), ((4,), (N, 3)), ((4,), (4, N, 3)), ((4,), (2, 1, N, 3))],
)
@pytest.mark.parametrize("upper", [False, True])
def test_product_of_a_factor_matches_upstream(upper: bool, batch: tuple, shape: tuple) -> None:
    results = []
    for flag in (False, True):
        matrix = (spd(*batch).triu() if upper else spd(*batch).tril()).requires_grad_()
        rhs = inputs(shape[-1], shape[-2] if len(shape) > 1 else 1, shape[:-2]).mT.reshape(shape).requires_grad_()
        with use_torch_tensors(flag):
            product = TriangularLinearOperator(matrix, upper=upper).matmul(rhs)
        results.append((product, *torch.autograd.grad(product.square().sum(), [matrix, rhs])))
    assert results[1][0].shape == results[0][0].shape
    for off, on in zip(*results, strict=True):
        assert_near(on.detach(), off.detach())


@pytest.mark.parametrize("shape", [(N + 1, 3), (N + 1,), (3, N)])
def test_product_of_other_sizes_is_upstreams_error(shape: tuple) -> None:
    said = []
    for flag in (False, True):
        with use_torch_tensors(flag), pytest.raises(RuntimeError) as raised:
            TriangularLinearOperator(spd().tril()).matmul(torch.ones(shape, dtype=torch.float64))
        said.append(str(raised.value))
    assert said[0] == said[1]


def test_samples_are_a_product_of_tensors() -> None:
    leaf = spd().requires_grad_()
    with use_torch_tensors():
        samples = MultivariateNormal(leaf[0], DenseLinearOperator(leaf)).rsample(base_samples=inputs(3, N))
    names, left = set(), [samples.grad_fn]
    while left:
        node = left.pop()
        names.add(node.name())
        left += [each for each, _ in node.next_functions if each is not None]
    assert "LinalgCholeskyExBackward0" in names and "MatmulBackward" not in names


@pytest.mark.parametrize("batch", [(), (2,)])
def test_product_of_matrices_is_differentiated_through_a_solve_as_upstreams(batch: tuple[int, ...]) -> None:
    factors = [spd(*batch).requires_grad_(), spd(*batch).square().requires_grad_()]
    rhs = torch.randn(*batch, N, 3, generator=generator(1), dtype=torch.float64)
    results = []
    for flag in (False, True):
        with use_torch_tensors(flag):
            product = DenseLinearOperator(factors[0]) * DenseLinearOperator(factors[1])
            value = product.add_diagonal(torch.ones(N, dtype=torch.float64)).solve(rhs)
            results.append([value.detach(), *torch.autograd.grad(value.square().sum(), factors)])
    for ours, theirs in zip(results[1], results[0], strict=True):
        assert_near(ours, theirs)
