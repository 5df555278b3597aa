"""What training data explain of a prior covariance: the closed form against plain operations."""

from __future__ import annotations

import pytest
import torch
from both_ways import assert_near, inputs
from torch import Tensor

from gpytorch.functions.explained_covariance import ExplainedCovariance, explained_covariance
from gpytorch.models.cholesky_factor import BorderedFactor, CholeskyFactor

N = 5


def lower(*batch: int, n: int = N, seed: int = 0) -> Tensor:
    return inputs(n, n, batch, seed=seed).tril() + 3.0 * torch.eye(n, dtype=torch.float64)


FACTORS = {
    "one": lambda: CholeskyFactor(lower()),
    "batch": lambda: CholeskyFactor(lower(3)),
    "bordered": lambda: BorderedFactor(CholeskyFactor(lower(n=3)), inputs(2, 3, (3,), seed=4), lower(3, n=2)),
}
each_factor = pytest.mark.parametrize("factor", FACTORS.values(), ids=FACTORS)
either_part = pytest.mark.parametrize("is_diagonal", [False, True])


def whole(factor: CholeskyFactor) -> Tensor:
    if type(factor) is CholeskyFactor:
        return factor.tensor
    *batch, num_below, num_first = factor.left.shape
    above = torch.cat([whole(factor.first), torch.zeros(num_first, num_below, dtype=torch.float64)], -1)
    below = torch.cat([factor.left, factor.corner.tensor], -1)
    return torch.cat([above.expand(*batch, *above.shape), below], -2)


def plain(cross: Tensor, factor: CholeskyFactor, is_diagonal: bool) -> Tensor:
    matrix = cross @ torch.cholesky_inverse(whole(factor)) @ cross.mT
    return matrix.diagonal(dim1=-2, dim2=-1) if is_diagonal else matrix


@either_part
@pytest.mark.parametrize("shape", [(4,), (1,), (3, 4), (2, 3, 1), (2, 1, 4)])
@each_factor
def test_value_and_gradients_match_plain_operations(factor, shape: tuple, is_diagonal: bool) -> None:
    factor = factor()
    cross = inputs(shape[-1], N, shape[:-1], seed=2).requires_grad_()
    found = []
    for function in (explained_covariance, plain):
        value = function(cross, factor, is_diagonal)
        # Not symmetric, as the cotangent of a matrix need not be
        (grad,) = torch.autograd.grad((value * inputs(1, value.numel()).view_as(value)).sum(), cross, create_graph=True)
        (again,) = torch.autograd.grad(value.sin().sum(), cross, retain_graph=True)
        (second,) = torch.autograd.grad(grad.square().sum(), cross)
        found.append((value, grad, again, second))
    for ours, expected in zip(*found, strict=True):
        assert ours.shape == expected.shape
        assert_near(ours, expected, rtol=1e-10)


@either_part
def test_second_derivatives_pass_gradgradcheck(is_diagonal: bool) -> None:
    factor = CholeskyFactor(lower())
    cross = inputs(2, N, seed=2).requires_grad_()
    assert torch.autograd.gradgradcheck(lambda cross: explained_covariance(cross, factor, is_diagonal), cross)


@either_part
def test_only_a_factor_without_a_gradient_takes_the_closed_form(is_diagonal: bool) -> None:
    cross = inputs(2, N, seed=2).requires_grad_()
    value = explained_covariance(cross, CholeskyFactor(lower()), is_diagonal)
    assert value.grad_fn.name() == f"{ExplainedCovariance.__name__}Backward"
    factor = CholeskyFactor(lower().requires_grad_())
    value = explained_covariance(cross, factor, is_diagonal)
    assert value.grad_fn.name() != f"{ExplainedCovariance.__name__}Backward"
    expected = torch.autograd.grad(plain(cross, factor, is_diagonal).sum(), [cross, factor.tensor])
    for ours, theirs in zip(torch.autograd.grad(value.sum(), [cross, factor.tensor]), expected, strict=True):
        assert_near(ours.tril(), theirs.tril(), rtol=1e-10)


@either_part
def test_program_transformations_see_plain_operations(is_diagonal: bool) -> None:
    factor, cross = CholeskyFactor(lower()), inputs(2, N, seed=2)
    ours, expected = (
        torch.func.jacfwd(lambda cross: function(cross, factor, is_diagonal))(cross.requires_grad_())  # noqa: B023
        for function in (explained_covariance, plain)
    )
    assert_near(ours, expected, rtol=1e-10)
