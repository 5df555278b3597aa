"""The inverse of a positive definite matrix from its Cholesky factor."""

from __future__ import annotations

import platform
from pathlib import Path

import torch
from linear_operator import settings
from linear_operator.utils.cholesky import psd_safe_cholesky
from torch import Tensor
from torch.autograd import Function

from .._transforms import is_transformed, is_vmapped
from ..closed_form.stationary import add_product_


def _is_intels() -> bool:
    # Whether the processor is one of Intel's; `platform` knows only its architecture on Linux.
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.exists():
        return "GenuineIntel" in platform.processor()
    with cpuinfo.open() as lines:
        return "GenuineIntel" in lines.read(1024)


# LAPACK's potri reaches about two thirds of the rate of a matrix product. From this size on the inverse is put together
# from the inverses of diagonal blocks by matrix products: a tenth more operations, at the full rate.
_BLOCKED_FROM = 768
# So many rows of a symmetric product are computed at a time, from the diagonal on.
_SYMMETRIC_ROWS = {"cpu": 256, "cuda": 1024}
# For small matrices potri is slow on Intel's processors, in batches above all, and slower on several threads than on
# one. L^-1 and its product with itself, twice to four times the operations, then take as little as half of the time.
# On AMD's that takes up to four times as long as potri.
_PRODUCT_UP_TO, _PRODUCT_ON_THREADS_UP_TO = (64, 256) if _is_intels() else (0, 0)
# On CUDA, where torch.cholesky_inverse solves for the identity, for one matrix of a batch after the other, the product
# takes from a half to a tenth of that, and beyond this size more than blocks put together.
_PRODUCT_ON_CUDA_UP_TO = 3000
# The product is summed over about so many rows at a time, each of which reaches to the diagonal only. A longer sum of
# squares in single precision comes out too small, always: the gradient of a scale, in which the diagonal's share nearly
# cancels, would be up to twenty times as far off as by potri. On CUDA, where many products take many launches, the
# diagonal is summed once more in double precision.
_PRODUCT_ROWS = {torch.float32: 32, torch.float64: 64}
_PRODUCT_ROWS_ON_CUDA = 1024


def cholesky_inverse_(factor: Tensor) -> Tensor:
    r"""
    Computes :math:`(\mathbf L \mathbf L^\top)^{-1}` in the memory of :math:`\mathbf L`.

    :param factor: Lower triangular :math:`\mathbf L` (... x N x N), which is overwritten.
    :return: The inverse (... x N x N), both triangles.
    """
    n = factor.size(-1)
    if _takes_product(factor):
        return _product_of_root_(_inverse_root(factor), factor.mT)
    if factor.dim() > 2 or n < _BLOCKED_FROM:
        return torch.cholesky_inverse(factor, out=factor)
    # With L = [[A, 0], [B, C]] and Y = B A^-1, the inverse of L L^T is
    #   [[ (A A^T)^-1 + Y^T X Y,   -Y^T X ],
    #    [ -X Y,                    X     ]]    where X = (C C^T)^-1.
    half = n // 2
    upper_left, lower_left, lower_right = factor[:half, :half], factor[half:, :half], factor[half:, half:]
    y = torch.linalg.solve_triangular(upper_left, lower_left, upper=False, left=False)
    _invert_block_(upper_left)
    _invert_block_(lower_right)
    torch.mm(lower_right, y, out=lower_left).neg_()
    num_rows = _SYMMETRIC_ROWS["cuda" if factor.is_cuda else "cpu"]
    for start in range(0, half, num_rows):
        rows, beyond = slice(start, start + num_rows), slice(start + num_rows, None)
        upper_left[rows, start:].addmm_(y[:, rows].mT, lower_left[:, start:], alpha=-1)
        upper_left[beyond, rows] = upper_left[rows, beyond].mT
    factor[:half, half:] = lower_left.mT
    return factor


def inverse_and_solutions_(factor: Tensor, rhs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    r"""
    Computes :math:`(\mathbf L \mathbf L^\top)^{-1}` in the memory of :math:`\mathbf L`, and solutions with both.

    :param factor: Lower triangular :math:`\mathbf L` (... x N x N), which is overwritten.
    :param rhs: :math:`\mathbf R` (... x N x S).
    :return: The inverse (... x N x N), both triangles; :math:`\mathbf L^{-1} \mathbf R`; and
        :math:`(\mathbf L \mathbf L^\top)^{-1} \mathbf R` (... x N x S each).
    """
    if _takes_product(factor):
        root = _inverse_root(factor)
        half = torch.matmul(root, rhs)
        # By substitution: the sum of a product's elements, a constant mean's gradient, would be half as far off again.
        # On CUDA that takes twice as long as the product.
        solution = root.mT @ half if factor.is_cuda else torch.linalg.solve_triangular(factor.mT, half, upper=True)
        return _product_of_root_(root, factor.mT), half, solution
    half = torch.linalg.solve_triangular(factor, rhs, upper=False)
    solution = torch.linalg.solve_triangular(factor.mT, half, upper=True)
    return cholesky_inverse_(factor), half, solution


def _takes_product(factor: Tensor) -> bool:
    n = factor.size(-1)
    if factor.is_cuda:
        return factor.dim() > 2 or n <= _PRODUCT_ON_CUDA_UP_TO
    most = _PRODUCT_ON_THREADS_UP_TO if n > _PRODUCT_UP_TO and torch.get_num_threads() > 1 else _PRODUCT_UP_TO
    return n <= most


def _inverse_root(factor: Tensor) -> Tensor:
    root = torch.eye(factor.size(-1), dtype=factor.dtype, device=factor.device)
    in_place = factor.dim() == 2 and not factor.is_cuda
    return torch.linalg.solve_triangular(factor, root, upper=False, out=root if in_place else None)


def _product_of_root_(root: Tensor, out: Tensor) -> Tensor:
    # L^-T L^-1, where L^-1 is lower triangular
    n, size = root.size(-1), _PRODUCT_ROWS_ON_CUDA if root.is_cuda else _PRODUCT_ROWS[root.dtype]
    stop = n
    if n <= 2 * size:
        torch.matmul(root.mT, root, out=out)
        stop = 0
    while stop:
        start = stop - size if 8 * stop > 9 * size else 0  # no product of a few rows at the end
        rows = root[..., start:stop, :stop]
        add_product_(out[..., :stop, :stop], rows.mT, rows, beta=int(stop < n))
        stop = start
    if root.is_cuda and root.dtype is torch.float32:
        squares = torch.linalg.vector_norm(root, dim=-2, dtype=torch.float64).square_()
        out.diagonal(dim1=-2, dim2=-1).copy_(squares)
    return out


def _invert_block_(block: Tensor) -> None:
    if block.size(-1) >= _BLOCKED_FROM or _takes_product(block):
        cholesky_inverse_(block)
    else:
        block.copy_(torch.cholesky_inverse(block))  # LAPACK takes no block of a larger matrix from torch


class PsdInverse(Function):
    r"""
    The inverse :math:`\mathbf P = \mathbf K^{-1}` of a positive definite matrix. Call :func:`psd_inverse`.
    """

    # dP = -P dK P, so with the cotangent C of P, made symmetric: dL/dK = -P C P.

    @staticmethod
    def forward(ctx, matrix: Tensor) -> Tensor:
        inverse = cholesky_inverse_(psd_safe_cholesky(matrix))
        ctx.save_for_backward(inverse)
        return inverse

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        (inverse,) = ctx.saved_tensors
        grad = 0.5 * (grad + grad.mT)
        return -(inverse @ grad @ inverse)


def psd_inverse(matrix: Tensor) -> Tensor:
    r"""
    Computes the inverse of a positive definite matrix, with the jitter, warnings and errors of
    :func:`~linear_operator.utils.cholesky.psd_safe_cholesky`.

    :param matrix: Symmetric positive definite :math:`\mathbf K` (... x N x N).
    :return: :math:`\mathbf K^{-1}` (... x N x N).
    """
    if is_transformed():
        return torch.cholesky_inverse(differentiable_cholesky(matrix))
    return PsdInverse.apply(matrix)


def differentiable_cholesky(matrix: Tensor) -> Tensor:
    r"""
    Computes the Cholesky factor by differentiable operations.

    :param matrix: Symmetric positive definite :math:`\mathbf K` (... x N x N).
    :return: :math:`\mathbf L` (... x N x N).
    """
    if matrix.size(-1) == 1:
        return matrix.clamp_min(0.0).sqrt()  # as LinearOperator.cholesky takes it
    return safe_cholesky(matrix)


def safe_cholesky(matrix: Tensor) -> Tensor:
    r"""
    Computes the Cholesky factor as :func:`~linear_operator.utils.cholesky.psd_safe_cholesky` does. Under `torch.vmap`
    and `torch.compile`, where no value may decide what is computed next, no jitter is added to a matrix that is not
    positive definite: it is an error.

    :param matrix: Symmetric positive definite :math:`\mathbf K` (... x N x N).
    :return: :math:`\mathbf L` (... x N x N).
    """
    if is_vmapped() or (torch.compiler.is_compiling() and settings.trace_mode.off()):
        return torch.linalg.cholesky(matrix)
    return psd_safe_cholesky(matrix)
