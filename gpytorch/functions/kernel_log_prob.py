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
from .._internals import is_graph_kept, multiplied
from .._shapes import as_columns, broadcast_shapes
from .._transforms import UntransformedFunction, below_autograd, is_transformed, must_be_differentiable
from ..closed_form.matrix import Expression, KernelMatrix, evaluate, evaluate_upper, plain
from ..closed_form.parameters import Cotangents, Parameter
from ..closed_form.stationary import add_product_
from .cholesky_inverse import cholesky_inverse_, inverse_and_solutions_
from .inv_quad_logdet import inv_quad_logdet
from .kernel_covariance import grad_of_plain
from .one_thread import on_one_thread

_LOG_2_PI = math.log(2 * math.pi)

# A matrix of up to this many bytes is differentiated where it is factorized, with others of its size beside it, which
# the kernel keeps. A larger one would not stay in a CPU's cache in between.
_AT_ONCE = {"cpu": 2**23, "cuda": 2**29}


class SmallKernelLogProb(UntransformedFunction):
    r"""
    The log density for a small covariance matrix, which is differentiated in the forward, while all that takes is at
    hand. The backward only scales what came out. Call :func:`log_prob`, which also knows when not to use this.
    """

    # The deviance is L = -2 log p = r^T K^-1 r + log |K| + N log 2 pi. With alpha = K^-1 r,
    #   dL/dr         = 2 alpha
    #   dL/dK     = G = K^-1 - alpha alpha^T
    #   dL/dsigma^2_i = G_ii
    # and dL/dK goes on into the kernel. What is returned is the deviance over -2 per: so is what all that is multiplied
    # by. It is divided here since the engine takes as long over a node as over a small operation.

    @staticmethod
    @on_one_thread(lambda ctx, expression, noises, per, residual, *values: residual.shape)
    @below_autograd
    def forward(
        ctx, expression: Expression, noises: Sequence[Parameter], per: int, residual: Tensor, *values: Tensor
    ) -> Tensor:
        r"""
        :param expression: :math:`\mathbf K_\theta` in terms of `values`.
        :param noises: What :math:`\boldsymbol \sigma^2` is the sum of (each ... x N or ... x 1).
        :param per: What the log density is divided by.
        :param residual: :math:`\mathbf r` (... x N).
        :param values: The tensors that :math:`\mathbf K_\theta` and the noises are made of, all of one batch shape.
        :return: The log density, over `per` (...).
        """
        ctx.save_for_backward(residual, *values)
        ctx.expression, ctx.noises, ctx.per, ctx.gradient = expression, noises, per, None
        matrix, record = KernelMatrix(expression, values, again=True), []
        factor = _factorize(matrix.evaluate(record=record), matrix, noises)
        log_diagonal, rhs = _log_diagonal(factor), _as_type_of(factor, residual).unsqueeze(-1)
        residual_needed, *needed = ctx.needs_input_grad[3:]
        cotangents = Cotangents(values, needed)
        if any(needed):
            inverse, half, alpha = inverse_and_solutions_(factor, rhs)
            grad_matrix = inverse.addcmul_(alpha, alpha.mT, value=-1)
            _pull_back_noise(noises, cotangents, grad_matrix)
            matrix.pull_back(cotangents, grad_matrix, record=record, symmetric=True)
        else:
            half = torch.linalg.solve_triangular(factor, rhs, upper=False)
            alpha = torch.linalg.solve_triangular(factor.mT, half, upper=True)
        ctx.gradient = [(alpha + alpha).view_as(residual) if residual_needed else None, *cotangents.sums]
        return _log_density(log_diagonal, half, (-2, -1), per)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        if must_be_differentiable(grad):

            def plain(residual: Tensor, *values: Tensor) -> Tensor:
                return _plain_log_prob(ctx.expression, ctx.noises, values, residual) / ctx.per

            return None, None, None, *grad_of_plain(plain, ctx.saved_tensors, ctx.needs_input_grad[3:], grad)
        ctx.saved_tensors  # noqa: B018 (raises, as for every Function, where the graph has been freed)
        grad = grad * (-0.5 / ctx.per)
        if grad.dim() == 0:
            scaled = iter(multiplied([each for each in ctx.gradient if each is not None], grad))
            return None, None, None, *[None if each is None else next(scaled) for each in ctx.gradient]
        scaled = (grad[(..., *(None,) * (each.dim() - grad.dim()))] for each in ctx.gradient if each is not None)
        return None, None, None, *[None if each is None else each * next(scaled) for each in ctx.gradient]


class KernelLogProb(UntransformedFunction):
    r"""
    The log density, a large matrix being evaluated, factorized, inverted and differentiated in one N x N buffer.

    The backward evaluates the kernel again, a block of rows at a time, rather than keep it. Call :func:`log_prob`,
    which also knows when not to use this.
    """

    # With A = K^-1 R and g_s the cotangent of the log density of column s,
    #   dL/dR         = -A diag(g)
    #   dL/dK     = G = 1/2 (A diag(g) A^T - (sum_s g_s) K^-1)
    #   dL/dsigma^2_i = G_ii
    # and dL/dK goes on into the kernel in blocks. One triangle of the symmetric G says all there: a block holds the
    # elements on and right of the diagonal, those right of it twice.

    @staticmethod
    @below_autograd
    def forward(ctx, expression: Expression, noises: Sequence[Parameter], residual: Tensor, *values: Tensor) -> Tensor:
        r"""
        :param expression: :math:`\mathbf K_\theta` in terms of `values`.
        :param noises: What :math:`\boldsymbol \sigma^2` is the sum of (each ... x N or ... x 1).
        :param residual: :math:`\mathbf r`, of the covariance's batch shape (... x N), or several of them as columns
            (... x N x S).
        :param values: The tensors that :math:`\mathbf K_\theta` and the noises are made of.
        :return: The log density (...), or those of the columns (... x S).
        """
        matrix = KernelMatrix(expression, values, again=True)
        factor = _factorize(evaluate_upper(matrix), matrix, noises)
        ctx.is_vector = residual.dim() < factor.dim()
        rhs = _as_type_of(factor, residual)
        half = torch.linalg.solve_triangular(factor, rhs.unsqueeze(-1) if ctx.is_vector else rhs, upper=False)
        ctx.expression, ctx.noises, ctx.matrix = expression, noises, matrix
        # Saved, not kept as attributes, so that the backward frees them and not the next step.
        ctx.save_for_backward(residual, *values, factor, half)
        return _log_density(_log_diagonal(factor), half, (-2, -1) if ctx.is_vector else -2)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        if must_be_differentiable(grad):

            def plain(residual: Tensor, *values: Tensor) -> Tensor:
                if ctx.is_vector:
                    return _plain_log_prob(ctx.expression, ctx.noises, values, residual)
                covar = plain_covariance(ctx.expression, ctx.noises, values)
                return gaussian_log_prob(covar.unsqueeze(-3), residual.mT)  # each column a right-hand side of its own

            return None, None, *grad_of_plain(plain, ctx.saved_tensors[:-2], ctx.needs_input_grad[2:], grad)
        residual, *values, factor, half = ctx.saved_tensors
        residual_needed, *needed = ctx.needs_input_grad[2:]
        grad = grad[..., None, None] if ctx.is_vector else grad.unsqueeze(-2)
        alpha = torch.linalg.solve_triangular(factor.mT, half, upper=True)
        weighted = alpha * grad
        grad_residual = weighted.neg().view_as(residual) if residual_needed else None
        cotangents = Cotangents(values, needed)
        if any(needed):
            total = grad if ctx.is_vector else grad.sum(-1, keepdim=True)
            grad_matrix = cholesky_inverse_(factor.clone() if is_graph_kept() else factor)
            for start, stop in ctx.matrix.row_blocks():
                rows, cols = slice(start, stop), slice(start, None)
                block = grad_matrix[..., rows, cols].mul_(-total)
                add_product_(block, weighted[..., rows, :], alpha[..., cols, :].mT)
                block[..., : stop - start].triu_().diagonal(0, -2, -1).mul_(0.5)
                ctx.matrix.pull_back(cotangents, block, rows, cols)
            _pull_back_noise(ctx.noises, cotangents, grad_matrix)
        return None, None, grad_residual, *cotangents.sums


def _as_type_of(matrix: Tensor, residual: Tensor) -> Tensor:
    # As upstream: targets in double precision do for a model in single, and the other way round
    return residual if residual.dtype is matrix.dtype else residual.to(matrix.dtype)


def _log_diagonal(factor: Tensor) -> Tensor:
    return factor.diagonal(0, -2, -1).log().unsqueeze(-1)


def _log_density(log_diagonal: Tensor, half: Tensor, dim: int | tuple[int, int], per: int = 1) -> Tensor:
    # The two sums, of log L_ii and of half_i^2 / 2, in one
    minus = torch.addcmul(log_diagonal, half, half, value=0.5).sum(dim)
    return torch.rsub(minus, -0.5 * half.size(-2) * _LOG_2_PI / per, alpha=1 / per)


def _pull_back_noise(noises: Sequence[Parameter], cotangents: Cotangents, grad_matrix: Tensor) -> None:
    grad = grad_matrix.diagonal(0, -2, -1)
    for noise in noises:
        if cotangents.needed[noise.slot]:
            # Not the diagonal itself, which would keep the matrix.
            is_shared = cotangents.values[noise.slot].size(-1) == 1
            cotangents.add_of(noise, grad.sum(-1, keepdim=True) if is_shared else grad.clone())


def log_prob(
    expression: Expression,
    noises: Sequence[Parameter],
    values: Sequence[Tensor],
    residual: Tensor,
    batch_shape: torch.Size,
    is_uniform: bool,
    per: int = 1,
) -> Tensor:
    r"""
    Computes the log density.

    :param expression: :math:`\mathbf K_\theta` in terms of `values`.
    :param noises: What :math:`\boldsymbol \sigma^2` is the sum of (each ... x N or ... x 1).
    :param values: The tensors that :math:`\mathbf K_\theta` and the noises are made of.
    :param residual: :math:`\mathbf r` (... x N).
    :param batch_shape: The covariance matrix's.
    :param is_uniform: Whether all the values have that batch shape.
    :param per: What the log density is divided by.
    :return: The log density over `per`, of the shape to which the batch shapes of residual and covariance broadcast.
    """
    if is_transformed() or residual.size(-1) == 1:
        res = _plain_log_prob(expression, noises, values, residual)
        return res if per == 1 else res / per
    if residual.shape[:-1] != batch_shape:
        columns, restore = as_columns(batch_shape, residual.unsqueeze(-1))
        res = restore(KernelLogProb.apply(expression, noises, columns, *values).unsqueeze(-2))[..., 0, 0]
    else:
        num_bytes = residual.numel() * residual.size(-1) * residual.element_size()
        is_small = 0 < num_bytes <= _AT_ONCE.get(residual.device.type, _AT_ONCE["cpu"])
        if is_small and is_uniform and torch.is_grad_enabled():
            res, per = SmallKernelLogProb.apply(expression, noises, per, residual, *values), 1
        else:
            res = KernelLogProb.apply(expression, noises, residual, *values)
    if per != 1:
        return res / per
    return res.clone() if res._is_view() else res  # as it is for inputs of a subclass: it may be written to


@below_autograd
def factorize(expression: Expression, noises: Sequence[Parameter], values: Sequence[Tensor]) -> Tensor:
    """Return the Cholesky factor of a covariance matrix with noise, in the memory that the matrix was evaluated in and
    without a gradient.

    :param expression: The matrix in terms of `values`.
    :param noises: What the noise on its diagonal is the sum of (each ... x N or ... x 1).
    :param values: The tensors that the matrix and the noises are made of.
    """
    matrix = KernelMatrix(expression, values)
    return _factorize(evaluate_upper(matrix), matrix, noises)


def gaussian_log_prob(matrix: Tensor, residual: Tensor) -> Tensor:
    r"""
    Computes the log density for a covariance matrix that is a tensor.

    :param matrix: :math:`\mathbf K` (... x N x N).
    :param residual: :math:`\mathbf r` (... x N).
    :return: The log density, of the shape to which the batch shapes broadcast.
    """
    inv_quad, logdet = inv_quad_logdet(matrix, _as_type_of(matrix, residual).unsqueeze(-1))
    return -0.5 * (inv_quad + logdet + residual.size(-1) * _LOG_2_PI)


def plain_covariance(expression: Expression, noises: Sequence[Parameter], values: Sequence[Tensor]) -> Tensor:
    """Return the covariance matrix of an expression, with noise, by differentiable operations.

    :param expression: The matrix in terms of `values`.
    :param noises: What the noise on its diagonal is the sum of (each ... x N or ... x 1).
    :param values: The tensors that the matrix and the noises are made of.
    """
    return with_noise(plain(expression, values), noises, values)


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


def _factorize(covar: Tensor, matrix: KernelMatrix, noises: Sequence[Parameter]) -> Tensor:
    # Noise goes onto the diagonal of the matrix as evaluated, of which the upper triangle will do, and the factor into
    # its memory. Where that fails it is evaluated again; psd_safe_cholesky warns, adds jitter or raises, as it does for
    # everybody.
    if settings.verbose_linalg.on():
        settings.verbose_linalg.logger.debug(f"Running Cholesky on a matrix of size {covar.shape}.")
    factor = _add_noise(covar, noises, matrix.values).mT  # in LAPACK's order
    # One and the same tensor: another view would be copied onto itself.
    _, info = torch.linalg.cholesky_ex(factor, out=(factor, factor.new_empty(factor.shape[:-2], dtype=torch.int32)))
    if not (info.any() if info.dim() else info) or linear_operator_settings.trace_mode.on():
        return factor
    return psd_safe_cholesky(_add_noise(evaluate(matrix), noises, matrix.values))


def _add_noise(covar: Tensor, noises: Sequence[Parameter], values: Sequence[Tensor]) -> Tensor:
    for parameter in noises:
        noise = parameter.of(values)
        if noise.dim() > 1 and noise.shape[:-1] != covar.shape[:-2]:
            batch_shape = broadcast_shapes(noise.shape[:-1], covar.shape[:-2])
            covar = covar.expand(*batch_shape, *covar.shape[-2:]).contiguous()
        covar.diagonal(0, -2, -1).add_(noise)
    return covar
