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
from linear_operator import settings as linear_operator_settings
from linear_operator.utils.cholesky import psd_safe_cholesky
from torch import Tensor

from .. import settings
from ._transforms import UntransformedFunction, is_transformed, must_be_differentiable
from .cholesky_inverse import cholesky_inverse_
from .inv_quad_logdet import as_columns, inv_quad_logdet
from .kernel_covariance import (
    Cotangents,
    Expression,
    Matrix,
    Parameter,
    add_product_,
    aliases,
    evaluate,
    evaluate_upper,
    grad_of_plain,
    is_graph_kept,
    row_blocks,
)

_LOG_2_PI = math.log(2 * math.pi)

# A matrix of up to this many bytes is differentiated where it is factorized, with others of its size beside it, which
# the kernel keeps. A larger one would not stay in a CPU's cache in between.
_AT_ONCE = {"cpu": 2**23, "cuda": 2**29}


class KernelLogProb(UntransformedFunction):
    r"""
    The log density, a large matrix being evaluated, factorized, inverted and differentiated in one N x N buffer.

    A small matrix is differentiated in the forward, while all that takes is at hand, and the backward only scales what
    came out. For a large one the backward evaluates the kernel again, a block of rows at a time, rather than keep it.
    Call :func:`log_prob`, which also knows when not to use this.
    """

    @staticmethod
    def forward(
        ctx,
        expression: Expression,
        noises: Sequence[Parameter],
        at_once: bool,
        residual: Tensor,
        *values: Tensor,
    ) -> Tensor:
        r"""
        :param expression: :math:`\mathbf K_\theta` in terms of `values`.
        :param noises: What :math:`\boldsymbol \sigma^2` is the sum of (each ... x N or ... x 1).
        :param at_once: Whether to differentiate here, if the matrix is small. There may be no columns then, and all the
            values have the covariance's batch shape.
        :param residual: :math:`\mathbf r`, of the covariance's batch shape (... x N), or several of them as columns
            (... x N x S).
        :param values: The tensors that :math:`\mathbf K_\theta` and the noises are made of.
        :return: The log density (...), or those of the columns (... x S).
        """
        matrix = expression(values)
        size = residual.numel() * residual.size(-1) * residual.element_size()
        at_once = at_once and size <= _AT_ONCE.get(residual.device.type, _AT_ONCE["cpu"])
        factor = _factorize(matrix, noises, values, at_once)
        ctx.is_vector = residual.dim() < factor.dim()
        half = torch.linalg.solve_triangular(factor, residual.unsqueeze(-1) if ctx.is_vector else residual, upper=False)
        log_diagonal = factor.diagonal(dim1=-2, dim2=-1).log().sum(-1, keepdim=not ctx.is_vector)
        inv_quad = half.square().sum((-2, -1) if ctx.is_vector else -2)
        res = torch.rsub(torch.add(log_diagonal, inv_quad, alpha=0.5), -0.5 * factor.size(-1) * _LOG_2_PI)
        ctx.expression, ctx.noises, ctx.matrix, ctx.gradient = expression, noises, None, None
        # Saved, not kept as attributes, so that the backward frees them and not the next step.
        if at_once:
            ctx.save_for_backward(residual, *values)
            ctx.gradient = _gradient_at_once(ctx, matrix, factor, half, residual, values)
        else:
            ctx.save_for_backward(residual, *values, factor, half)
            ctx.matrix = matrix
        return res

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        if must_be_differentiable():
            return _differentiable_backward(ctx, grad)
        residual, *values = ctx.saved_tensors
        if ctx.gradient is not None:
            return None, None, None, *_scaled(ctx.gradient, grad)
        *values, factor, half = values
        grad = grad[..., None, None] if ctx.is_vector else grad.unsqueeze(-2)
        factor = factor.clone() if is_graph_kept() else factor  # which is overwritten
        return None, None, None, *_gradient(ctx, grad, factor, half, residual, values)


# With A = K^-1 R and g_s the cotangent of the log density of column s,
#   dL/dR         = -A diag(g)
#   dL/dK     = G = 1/2 (A diag(g) A^T - (sum_s g_s) K^-1)
#   dL/dsigma^2_i = G_ii
# and dL/dK goes on into the kernel: at once as a whole, or in blocks. One triangle of the symmetric G says all there: a
# block holds the elements on and right of the diagonal, those right of it twice.


def _gradient_at_once(
    ctx, matrix: Matrix, factor: Tensor, half: Tensor, residual: Tensor, values: Sequence[Tensor]
) -> list[Tensor | None]:
    # The gradient of the log density in residual and values. The factor is overwritten.
    residual_needed, *needed = ctx.needs_input_grad[3:]
    alpha = torch.linalg.solve_triangular(factor.mT, half, upper=True)
    grad_residual = alpha.neg().view_as(residual) if residual_needed else None
    if not any(needed):
        return [grad_residual, *(None for _ in needed)]
    cotangents = Cotangents(values, needed)
    grad_matrix = add_product_(cholesky_inverse_(factor), alpha, alpha.mT, beta=-0.5, alpha=0.5)
    _pull_back_noise(ctx.noises, cotangents, grad_matrix)
    matrix.pull_back_at_once(cotangents, grad_matrix)
    return [grad_residual, *cotangents.sums]


def _gradient(
    ctx, grad: Tensor, factor: Tensor, half: Tensor, residual: Tensor, values: Sequence[Tensor]
) -> list[Tensor | None]:
    # The cotangents of residual and values for those of the log density, `grad` (... x 1 x S). The factor is
    # overwritten.
    residual_needed, *needed = ctx.needs_input_grad[3:]
    alpha = torch.linalg.solve_triangular(factor.mT, half, upper=True)
    weighted = alpha * grad
    grad_residual = weighted.neg().view_as(residual) if residual_needed else None
    if not any(needed):
        return [grad_residual, *(None for _ in needed)]
    cotangents, grad_matrix = Cotangents(values, needed), cholesky_inverse_(factor)
    total = grad if ctx.is_vector else grad.sum(-1, keepdim=True)
    for start, stop in row_blocks(ctx.matrix.shape, ctx.matrix.device):
        rows, cols = slice(start, stop), slice(start, None)
        block = grad_matrix[..., rows, cols].mul_(-total)
        add_product_(block, weighted[..., rows, :], alpha[..., cols, :].mT)
        block[..., : stop - start].triu_().diagonal(dim1=-2, dim2=-1).mul_(0.5)
        ctx.matrix.pull_back(cotangents, block, rows, cols)
    _pull_back_noise(ctx.noises, cotangents, grad_matrix)
    return [grad_residual, *cotangents.sums]


def _pull_back_noise(noises: Sequence[Parameter], cotangents: Cotangents, grad_matrix: Tensor) -> None:
    grad = grad_matrix.diagonal(dim1=-2, dim2=-1)
    for noise in noises:
        if cotangents.needed[noise.slot]:
            # Not the diagonal itself, which would keep the matrix.
            is_shared = cotangents.values[noise.slot].size(-1) == 1
            cotangents.add_of(noise, grad.sum(-1, keepdim=True) if is_shared else grad.clone())


def _scaled(gradient: list[Tensor | None], grad: Tensor) -> list[Tensor | None]:
    if grad.dim() == 0:
        return [None if each is None else each * grad for each in gradient]
    return [None if each is None else each * grad[(..., *(None,) * (each.dim() - grad.dim()))] for each in gradient]


def log_prob(
    expression: Expression,
    noises: Sequence[Parameter],
    values: Sequence[Tensor],
    residual: Tensor,
    batch_shape: torch.Size,
    is_uniform: bool,
) -> Tensor:
    r"""
    Computes the log density.

    :param expression: :math:`\mathbf K_\theta` in terms of `values`.
    :param noises: What :math:`\boldsymbol \sigma^2` is the sum of (each ... x N or ... x 1).
    :param values: The tensors that :math:`\mathbf K_\theta` and the noises are made of.
    :param residual: :math:`\mathbf r` (... x N).
    :param batch_shape: The covariance matrix's.
    :param is_uniform: Whether all the values have that batch shape.
    :return: The log density, of the shape to which the batch shapes of residual and covariance broadcast.
    """
    if is_transformed() or residual.size(-1) == 1:
        return _plain_log_prob(expression, noises, values, residual)
    if residual.shape[:-1] == batch_shape:
        at_once = is_uniform and residual.numel() > 0 and torch.is_grad_enabled()
        return KernelLogProb.apply(expression, noises, at_once, residual, *values)
    columns, restore = as_columns(batch_shape, residual.unsqueeze(-1))
    return restore(KernelLogProb.apply(expression, noises, False, columns, *values).unsqueeze(-2))[..., 0, 0]


def factorize(expression: Expression, noises: Sequence[Parameter], values: Sequence[Tensor]) -> Tensor:
    """Return the Cholesky factor of a covariance matrix with noise, in the memory that the matrix was evaluated in.

    :param expression: The matrix in terms of `values`.
    :param noises: What the noise on its diagonal is the sum of (each ... x N or ... x 1).
    :param values: The tensors that the matrix and the noises are made of.
    """
    return _factorize(expression(values), noises, values, at_once=False)


def gaussian_log_prob(matrix: Tensor, residual: Tensor) -> Tensor:
    r"""
    Computes the log density for a covariance matrix that is a tensor.

    :param matrix: :math:`\mathbf K` (... x N x N).
    :param residual: :math:`\mathbf r` (... x N).
    :return: The log density, of the shape to which the batch shapes broadcast.
    """
    inv_quad, logdet = inv_quad_logdet(matrix, residual.unsqueeze(-1))
    return -0.5 * (inv_quad + logdet + residual.size(-1) * _LOG_2_PI)


def plain_covariance(expression: Expression, noises: Sequence[Parameter], values: Sequence[Tensor]) -> Tensor:
    """Return the covariance matrix of an expression, with noise, by differentiable operations.

    :param expression: The matrix in terms of `values`.
    :param noises: What the noise on its diagonal is the sum of (each ... x N or ... x 1).
    :param values: The tensors that the matrix and the noises are made of.
    """
    return with_noise(expression(values).plain(), noises, values)


def with_noise(covar: Tensor, noises: Sequence[Parameter], values: Sequence[Tensor]) -> Tensor:
    """Add noise to the diagonal of a covariance matrix by differentiable operations.

    :param covar: The covariance matrix (... x N x N).
    :param noises: What the noise is the sum of (each ... x N or ... x 1).
    :param values: The tensors that the noises are made of.
    """
    for parameter in noises:
        covar = add_diagonal(covar, parameter.of(values))
    return covar


def add_diagonal(covar: Tensor, noise: Tensor) -> Tensor:
    """Add noise to the diagonal of a covariance matrix by differentiable operations.

    :param covar: The covariance matrix (... x N x N).
    :param noise: The noise (... x N or ... x 1).
    """
    return covar + torch.diag_embed(noise.expand(*noise.shape[:-1], covar.size(-1)))


def _plain_log_prob(
    expression: Expression, noises: Sequence[Parameter], values: Sequence[Tensor], residual: Tensor
) -> Tensor:
    return gaussian_log_prob(plain_covariance(expression, noises, values), residual)


def _differentiable_backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
    needed = ctx.needs_input_grad[3:]
    residual, *values = aliases(ctx.saved_tensors[: len(needed)])
    if ctx.is_vector:
        res = _plain_log_prob(ctx.expression, ctx.noises, values, residual)
    else:  # each column as a right-hand side of its own
        covar = plain_covariance(ctx.expression, ctx.noises, values).unsqueeze(-3)
        res = gaussian_log_prob(covar, residual.mT)
    return None, None, None, *grad_of_plain(res, (residual, *values), needed, grad)


def _factorize(matrix: Matrix, noises: Sequence[Parameter], values: Sequence[Tensor], at_once: bool) -> Tensor:
    # A large matrix is factorized in its own memory. Where that fails it is evaluated again; psd_safe_cholesky warns,
    # adds jitter or raises, as it does for everybody.
    if settings.verbose_linalg.on():
        settings.verbose_linalg.logger.debug(f"Running Cholesky on a matrix of size {matrix.shape}.")
    covar = _add_noise(matrix.evaluate_at_once() if at_once else evaluate_upper(matrix), noises, values)
    factor = covar.mT  # in LAPACK's order. One and the same tensor: another view would be copied onto itself.
    _, info = torch.linalg.cholesky_ex(factor, out=(factor, factor.new_empty(factor.shape[:-2], dtype=torch.int32)))
    if not (info.any() if info.dim() else info) or linear_operator_settings.trace_mode.on():
        return factor
    return psd_safe_cholesky(_add_noise(evaluate(matrix), noises, values))


def _add_noise(covar: Tensor, noises: Sequence[Parameter], values: Sequence[Tensor]) -> Tensor:
    for parameter in noises:
        noise = parameter.of(values)
        if noise.dim() > 1 and noise.shape[:-1] != covar.shape[:-2]:
            batch_shape = torch.broadcast_shapes(noise.shape[:-1], covar.shape[:-2])
            covar = covar.expand(*batch_shape, *covar.shape[-2:]).contiguous()
        covar.diagonal(dim1=-2, dim2=-1).add_(noise)
    return covar
