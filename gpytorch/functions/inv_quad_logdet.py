r"""The inverse quadratic form and the log determinant, by one Cholesky factorization.

.. math::
    \mathbf K = \mathbf L \mathbf L^\top, \qquad
    \mathbf r^\top \mathbf K^{-1} \mathbf r = \Vert \mathbf L^{-1} \mathbf r \Vert^2, \qquad
    \log \vert \mathbf K \vert = 2 \sum_i \log L_{ii}.
"""

from __future__ import annotations

from functools import reduce

import torch
from torch import Tensor
from torch.autograd import Function

from .._shapes import as_columns
from .._transforms import is_differentiated_by_transforms, must_be_differentiable
from .cholesky_inverse import cholesky_inverse_, differentiable_cholesky, safe_cholesky


class _OfColumns(Function):
    # The factor L is a third output: under create_graph the backward can then be differentiated without K being kept,
    # since L leads back to K through this node.
    #
    # With A = K^-1 R, a_s the cotangent of the quadratic form of column s, b that of the log determinant, C that of L:
    #   dL/dR = 2 A diag(a)
    #   dL/dK = b K^-1 - A diag(a) A^T + L^-T Phi(L^T C) L^-1, the last made symmetric,
    # where Phi takes the lower triangle and halves the diagonal (I. Murray, arXiv:1602.07527, equation 9).

    @staticmethod
    def forward(ctx, matrix: Tensor, columns: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        factor = safe_cholesky(matrix)
        half, inv_quad = _inv_quad(factor, columns)
        # Saved rather than kept as attributes, so that the backward frees them and not the next step.
        ctx.save_for_backward(factor, half, columns)
        ctx.set_materialize_grads(False)
        return inv_quad, _logdet(factor), factor

    @staticmethod
    def backward(
        ctx, grad_inv_quad: Tensor | None, grad_logdet: Tensor | None, grad_factor: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None]:
        factor, half, columns = ctx.saved_tensors
        differentiable = must_be_differentiable(grad_inv_quad, grad_logdet, grad_factor)
        if differentiable:
            half = torch.linalg.solve_triangular(factor, columns, upper=False)
        alpha, weighted = _alpha(factor, half, grad_inv_quad)
        grad_columns = 2 * weighted if ctx.needs_input_grad[1] and weighted is not None else None
        if not ctx.needs_input_grad[0]:
            return None, grad_columns
        terms = []
        if grad_logdet is not None:
            b = grad_logdet[..., None, None]
            terms.append(
                torch.cholesky_inverse(factor) * b if differentiable else cholesky_inverse_(factor.clone()).mul_(b)
            )
        if weighted is not None:
            terms.append(-weighted @ alpha.mT)
        if grad_factor is not None:
            terms.append(_pull_back_cholesky(factor, grad_factor))
        if not differentiable:
            return reduce(Tensor.add_, terms) if terms else None, grad_columns
        return sum(terms) if terms else None, grad_columns


class TensorInvQuadLogdet(_OfColumns):
    r"""
    Computes :math:`\mathbf r^\top \mathbf K^{-1} \mathbf r` and :math:`\log \vert \mathbf K \vert` with a closed-form
    backward: ``inv_quad, logdet = TensorInvQuadLogdet.apply(matrix, inv_quad_rhs)``.

    Both results have the batch shape to which those of the arguments broadcast. A matrix that meets many right-hand
    sides is factorized once. Jitter, its warnings and the errors for matrices that are not positive definite are those
    of :func:`~linear_operator.utils.cholesky.psd_safe_cholesky`. Second derivatives are right. In code of your own that
    `torch.compile` traces, call :func:`inv_quad_logdet`: the compiler goes from a Function's apply straight to its
    forward.
    """

    @staticmethod
    def apply(matrix: Tensor, inv_quad_rhs: Tensor) -> tuple[Tensor, Tensor]:
        """See :func:`inv_quad_logdet`."""
        return inv_quad_logdet(matrix, inv_quad_rhs)


def inv_quad_logdet(matrix: Tensor, inv_quad_rhs: Tensor) -> tuple[Tensor, Tensor]:
    r"""
    :param matrix: Symmetric positive definite :math:`\mathbf K` (... x N x N).
    :param inv_quad_rhs: :math:`\mathbf r` (... x N x 1); the quadratic forms of further columns are summed.
    :return: The inverse quadratic form and the log determinant (each of the broadcast batch shape).
    :raises RuntimeError: If the arguments' sizes, dtypes or devices do not match.
    :raises ~linear_operator.utils.errors.NanError: If the matrix contains NaN.
    :raises ~linear_operator.utils.errors.NotPSDError: If no jitter makes the matrix positive definite.
    """
    _check_operands(matrix, inv_quad_rhs)
    columns, restore = as_columns(matrix.shape[:-2], inv_quad_rhs)
    if is_differentiated_by_transforms() or matrix.size(-1) == 1:
        factor = differentiable_cholesky(matrix)
        inv_quad, logdet = _inv_quad(factor, columns)[1], _logdet(factor)
    else:
        inv_quad, logdet, _ = _OfColumns.apply(matrix, columns)
    inv_quad = restore(inv_quad.unsqueeze(-2)).sum((-2, -1))
    return inv_quad, logdet.expand(inv_quad.shape)


def _inv_quad(factor: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
    half = torch.linalg.solve_triangular(factor, columns, upper=False)
    return half, half.square().sum(-2)


def _logdet(factor: Tensor) -> Tensor:
    return factor.diagonal(dim1=-2, dim2=-1).log().sum(-1) * 2


def _alpha(factor: Tensor, half: Tensor, grad_inv_quad: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    if grad_inv_quad is None:
        return None, None
    alpha = torch.linalg.solve_triangular(factor.mT, half, upper=True)
    return alpha, alpha * grad_inv_quad.unsqueeze(-2)


def _pull_back_cholesky(factor: Tensor, grad_factor: Tensor) -> Tensor:
    phi = (factor.mT @ grad_factor).tril()
    phi = phi - 0.5 * torch.diag_embed(phi.diagonal(dim1=-2, dim2=-1))
    grad = torch.linalg.solve_triangular(factor.mT, phi, upper=True)
    grad = torch.linalg.solve_triangular(factor, grad, upper=False, left=False)
    return 0.5 * (grad + grad.mT)


def _check_operands(matrix: Tensor, inv_quad_rhs: Tensor) -> None:
    if matrix.dim() < 2 or matrix.size(-1) != matrix.size(-2):
        raise RuntimeError(f"The matrix must be (a batch of) square matrices. Got a matrix of size {matrix.shape}.")
    if inv_quad_rhs.dim() < 2 or inv_quad_rhs.size(-2) != matrix.size(-1):
        raise RuntimeError(
            f"The right-hand side must be (a batch of) columns with as many rows as the matrix. Got a matrix of size "
            f"{matrix.shape} and a right-hand side of size {inv_quad_rhs.shape}."
        )
    if matrix.dtype != inv_quad_rhs.dtype or matrix.device != inv_quad_rhs.device:
        raise RuntimeError(
            f"The matrix and the right-hand side must have the same dtype and lie on the same device. Got a matrix of "
            f"{matrix.dtype} on {matrix.device} and a right-hand side of {inv_quad_rhs.dtype} on {inv_quad_rhs.device}."
        )
