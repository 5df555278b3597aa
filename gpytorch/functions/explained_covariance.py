"""K(*, X) K(X, X)^-1 K(X, *), which a posterior covariance is the prior's less of, as one autograd node."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from .._transforms import UntransformedFunction, below_autograd, is_transformed, must_be_differentiable
from .kernel_covariance import grad_of_plain


class Factor(Protocol):
    r"""A Cholesky factor :math:`\mathbf L` (... x N x N)."""

    blocks: tuple[Tensor, ...]

    def half_solve(self, rhs: Tensor) -> Tensor:
        r"""Return :math:`\mathbf L^{-1} \mathbf R`."""

    def back_solve(self, rhs: Tensor) -> Tensor:
        r"""Return :math:`\mathbf L^{-\top} \mathbf R`."""


def explained_covariance(cross: Tensor, factor: Factor, is_diagonal: bool) -> Tensor:
    r"""
    Computes :math:`\mathbf C (\mathbf L \mathbf L^\top)^{-1} \mathbf C^\top`, or its diagonal.

    :param cross: :math:`\mathbf C` (... x M x N).
    :param factor: :math:`\mathbf L`.
    :param is_diagonal: Whether the diagonal is wanted.
    :return: The matrix (... x M x M) or its diagonal (... x M).
    """
    is_constant = not any(block.requires_grad for block in factor.blocks)
    if torch.is_grad_enabled() and cross.requires_grad and is_constant and not is_transformed():
        return ExplainedCovariance.apply(cross, factor, is_diagonal)
    return _explain(factor.half_solve(cross.mT), is_diagonal)


def _explain(half: Tensor, is_diagonal: bool) -> Tensor:
    return half.square().sum(-2) if is_diagonal else half.mT @ half


class ExplainedCovariance(UntransformedFunction):
    r"""
    :math:`\mathbf C (\mathbf L \mathbf L^\top)^{-1} \mathbf C^\top` of a factor that has no gradient. Call
    :func:`explained_covariance`.
    """

    # With H = L^-1 C^T and the cotangent G of H^T H: dL/dH = H (G + G^T), dL/dC = (L^-T dL/dH)^T.
    # With the cotangent g of the diagonal: dL/dH = 2 H diag(g).

    @staticmethod
    @below_autograd
    def forward(ctx, cross: Tensor, factor: Factor, is_diagonal: bool) -> Tensor:
        half = factor.half_solve(cross.mT)
        ctx.save_for_backward(cross, half)
        ctx.factor, ctx.is_diagonal = factor, is_diagonal
        return _explain(half, is_diagonal)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        cross, half = ctx.saved_tensors
        factor, is_diagonal = ctx.factor, ctx.is_diagonal
        if must_be_differentiable(grad):

            def explained(cross: Tensor) -> Tensor:
                return _explain(factor.half_solve(cross.mT), is_diagonal)

            return *grad_of_plain(explained, (cross,), (True,), grad), None, None
        of_half = half * (2.0 * grad).unsqueeze(-2) if is_diagonal else half @ (grad + grad.mT)
        return factor.back_solve(of_half).mT.sum_to_size(cross.shape), None, None
