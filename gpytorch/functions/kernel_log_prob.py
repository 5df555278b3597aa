r"""The log density of a Gaussian whose covariance matrix is a kernel with a closed-form gradient, and its gradient.

.. math::
    \log p = -\frac{1}{2} \left( \mathbf r^\top \mathbf K^{-1} \mathbf r + \log \vert \mathbf K \vert
        + N \log 2 \pi \right), \qquad
    \mathbf K = \mathbf K_\theta + \text{diag}(\boldsymbol \sigma^2) = \mathbf L \mathbf L^\top.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from linear_operator.utils.cholesky import psd_safe_cholesky
from torch import Tensor
from torch.autograd import Function

from .. import settings
from ._transforms import is_transformed, must_be_differentiable
from .cholesky_inverse import cholesky_inverse_
from .inv_quad_logdet import TensorInvQuadLogdet, as_columns
from .kernel_covariance import (
    Cotangents,
    Expression,
    Matrix,
    aliases,
    evaluate,
    evaluate_upper,
    grad_of_plain,
    row_blocks,
)

_LOG_2_PI = math.log(2 * math.pi)


class KernelLogProb(Function):
    r"""
    The log density, evaluated, factorized, inverted and differentiated in one N x N buffer.

    The backward evaluates the kernel again, a block of rows at a time, rather than keep it. Call :func:`log_prob`,
    which takes any residual and serves transformed code.
    """

    @staticmethod
    def forward(ctx, expression: Expression, noise: Tensor | None, residual: Tensor, *values: Tensor) -> Tensor:
        r"""
        :param expression: :math:`\mathbf K_\theta` in terms of `values`.
        :param noise: :math:`\boldsymbol \sigma^2` (... x N or ... x 1).
        :param residual: :math:`\mathbf r`, of the covariance's batch shape (... x N), or several of them as columns
            (... x N x S).
        :param values: The tensors that :math:`\mathbf K_\theta` is made of.
        :return: The log density (...), or those of the columns (... x S).
        """
        matrix = expression(values)
        ctx.bounds = row_blocks(matrix.shape, matrix.device)
        # A small matrix is worked through at once, and what it takes to differentiate it is kept.
        factor = _factorize(matrix, noise, keep=len(ctx.bounds) == 1 and any(ctx.needs_input_grad))
        is_vector = residual.dim() < factor.dim()
        half = torch.linalg.solve_triangular(factor, residual.unsqueeze(-1) if is_vector else residual, upper=False)
        log_diagonal = factor.diagonal(dim1=-2, dim2=-1).log().sum(-1, keepdim=not is_vector)
        # Saved, not kept as attributes, so that the backward frees them and not the next step.
        ctx.save_for_backward(factor, half, residual, noise, *values)
        ctx.expression, ctx.matrix, ctx.is_vector = expression, matrix, is_vector
        inv_quad = half.square().sum((-2, -1) if is_vector else -2)
        return inv_quad.mul_(-0.5).sub_(log_diagonal).sub_(0.5 * factor.size(-1) * _LOG_2_PI)

    # With A = K^-1 R and g_s the cotangent of the log density of column s,
    #   dL/dR         = -A diag(g)
    #   dL/dK     = G = 1/2 (A diag(g) A^T - (sum_s g_s) K^-1)
    #   dL/dsigma^2_i = G_ii
    # and dL/dK goes on into the kernel. One triangle of the symmetric G says all: a block of G holds the elements on
    # and right of the diagonal, those right of it twice.

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        if must_be_differentiable():
            return _differentiable_backward(ctx, grad)
        factor, half, residual, noise, *values = ctx.saved_tensors
        _, noise_needed, residual_needed, *needed = ctx.needs_input_grad
        half_grad = 0.5 * (grad[..., None, None] if ctx.is_vector else grad.unsqueeze(-2))
        alpha = torch.linalg.solve_triangular(factor.mT, half, upper=True)
        weighted = alpha * half_grad
        grad_residual = (-2 * weighted).view_as(residual) if residual_needed else None
        if not (noise_needed or any(needed)):
            return None, None, grad_residual, *(None for _ in needed)
        grad_matrix = cholesky_inverse_(factor if _may_overwrite() else factor.clone())
        b = half_grad if ctx.is_vector else half_grad.sum(-1, keepdim=True)
        matrix, cotangents = ctx.matrix, Cotangents(values, needed)
        if len(ctx.bounds) == 1:
            grad_matrix.mul_(-b)
            _add_outer_(grad_matrix, weighted, alpha)
            matrix.pull_back(cotangents, grad_matrix, symmetric=True)
        else:
            for start, stop in ctx.bounds:
                rows, cols = slice(start, stop), slice(start, None)
                block = grad_matrix[..., rows, cols].mul_(-2 * b)
                _add_outer_(block, 2 * weighted[..., rows, :], alpha[..., cols, :])
                block[..., : stop - start].triu_().diagonal(dim1=-2, dim2=-1).mul_(0.5)
                matrix.pull_back(cotangents, block, rows, cols)
        grad_noise = None
        if noise_needed:
            grad_noise = grad_matrix.diagonal(dim1=-2, dim2=-1).sum_to_size(noise.shape)
        return None, grad_noise, grad_residual, *cotangents.sums


def _add_outer_(block: Tensor, left: Tensor, right: Tensor) -> None:
    if block.dim() == 2:
        block.addmm_(left, right.mT)
    else:
        block.add_(left @ right.mT)


def log_prob(
    expression: Expression, values: Sequence[Tensor], noise: Tensor | None, residual: Tensor, batch_shape: torch.Size
) -> Tensor:
    r"""
    Computes the log density.

    :param expression: :math:`\mathbf K_\theta` in terms of `values`.
    :param values: The tensors that :math:`\mathbf K_\theta` is made of.
    :param noise: :math:`\boldsymbol \sigma^2` (... x N or ... x 1).
    :param residual: :math:`\mathbf r` (... x N).
    :param batch_shape: The covariance matrix's.
    :return: The log density, of the shape to which the batch shapes of residual and covariance broadcast.
    """
    if is_transformed() or residual.size(-1) == 1:
        return _plain_log_prob(expression, values, noise, residual)
    if residual.shape[:-1] == batch_shape:
        return KernelLogProb.apply(expression, noise, residual, *values)
    columns, restore = as_columns(batch_shape, residual.unsqueeze(-1))
    return restore(KernelLogProb.apply(expression, noise, columns, *values).unsqueeze(-2))[..., 0, 0]


def factorize(expression: Expression, values: Sequence[Tensor], noise: Tensor | None) -> Tensor:
    """Return the Cholesky factor of a covariance matrix with noise, in the memory that the matrix was evaluated in.

    :param expression: The matrix in terms of `values`.
    :param values: The tensors that it is made of.
    :param noise: What is added to its diagonal (... x N or ... x 1).
    """
    return _factorize(expression(values), noise, keep=False)


def gaussian_log_prob(matrix: Tensor, residual: Tensor) -> Tensor:
    r"""
    Computes the log density for a covariance matrix that is a tensor.

    :param matrix: :math:`\mathbf K` (... x N x N).
    :param residual: :math:`\mathbf r` (... x N).
    :return: The log density, of the shape to which the batch shapes broadcast.
    """
    inv_quad, logdet = TensorInvQuadLogdet.apply(matrix, residual.unsqueeze(-1))
    return -0.5 * (inv_quad + logdet + residual.size(-1) * _LOG_2_PI)


def plain_covariance(expression: Expression, values: Sequence[Tensor], noise: Tensor | None) -> Tensor:
    """Return the covariance matrix of an expression, with noise, by differentiable operations.

    :param expression: The matrix in terms of `values`.
    :param values: The tensors that the matrix is made of.
    :param noise: What is added to its diagonal (... x N or ... x 1).
    """
    covar = expression(values).plain()
    return covar if noise is None else add_diagonal(covar, noise)


def add_diagonal(covar: Tensor, noise: Tensor) -> Tensor:
    """Add noise to the diagonal of a covariance matrix by differentiable operations.

    :param covar: The covariance matrix (... x N x N).
    :param noise: The noise (... x N or ... x 1).
    """
    return covar + torch.diag_embed(noise.expand(*noise.shape[:-1], covar.size(-1)))


def _plain_log_prob(expression: Expression, values: Sequence[Tensor], noise: Tensor | None, residual: Tensor) -> Tensor:
    return gaussian_log_prob(plain_covariance(expression, values, noise), residual)


def _differentiable_backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
    residual, noise, *values = aliases(ctx.saved_tensors[2:])
    if ctx.is_vector:
        res = _plain_log_prob(ctx.expression, values, noise, residual)
    else:  # each column as a right-hand side of its own
        covar = plain_covariance(ctx.expression, values, noise).unsqueeze(-3)
        res = gaussian_log_prob(covar, residual.mT)
    return None, *grad_of_plain(res, (noise, residual, *values), ctx.needs_input_grad[1:], grad)


def _may_overwrite() -> bool:
    # Without retain_graph nothing reads the saved factor after this backward.
    return not torch._C._autograd._get_current_graph_task_keep_graph()


def _factorize(matrix: Matrix, noise: Tensor | None, keep: bool) -> Tensor:
    # A large matrix is factorized in its own memory. Where that fails it is evaluated again; psd_safe_cholesky warns,
    # adds jitter or raises, as it does for everybody.
    if settings.verbose_linalg.on():
        settings.verbose_linalg.logger.debug(f"Running Cholesky on a matrix of size {matrix.shape}.")
    if keep:
        factor, info = torch.linalg.cholesky_ex(_add_noise(matrix.evaluate(keep=True), noise))
    else:
        upper = _add_noise(evaluate_upper(matrix), noise)
        info = torch.empty(upper.shape[:-2], dtype=torch.int32, device=upper.device)
        factor, info = torch.linalg.cholesky_ex(upper.mT, out=(upper.mT, info))
    if settings.trace_mode.on() or not (info.any() if info.dim() else info):
        return factor
    return psd_safe_cholesky(_add_noise(evaluate(matrix), noise))


def _add_noise(covar: Tensor, noise: Tensor | None) -> Tensor:
    if noise is None:
        return covar
    if noise.dim() > 1 and noise.shape[:-1] != covar.shape[:-2]:
        batch_shape = torch.broadcast_shapes(noise.shape[:-1], covar.shape[:-2])
        covar = covar.expand(*batch_shape, *covar.shape[-2:]).contiguous()
    covar.diagonal(dim1=-2, dim2=-1).add_(noise)
    return covar
