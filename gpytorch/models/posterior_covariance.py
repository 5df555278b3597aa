"""The posterior covariance of an exact GP, of which nothing is computed before it is read."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, Protocol

import torch
from linear_operator.operators import DenseLinearOperator, DiagLinearOperator, LinearOperator
from torch import Tensor

from .. import _upstream
from ..functions.explained_covariance import explained_covariance
from ..utils.memoize import add_to_cache, cached
from .cholesky_factor import CholeskyFactor

_upstream_matmul = DiagLinearOperator.matmul

# Elements of K(test, train) that are held at once. Larger sets of test points go through in blocks.
BLOCK_ELEMENTS = 2**22


def row_blocks_of_tests(shape: torch.Size, num_train: int) -> list[slice | None]:
    """Return the blocks in which test points go through: [None] for all at once.

    :param shape: The shape of K(test, test) or K(test, train) (... x M x _).
    :param num_train: The number of training points.
    """
    num_test = shape[-2]
    elements = shape[:-1].numel() * num_train
    if elements <= BLOCK_ELEMENTS:
        return [None]
    size = max(1, BLOCK_ELEMENTS * num_test // elements)
    return [slice(start, min(start + size, num_test)) for start in range(0, num_test, size)]


class Unevaluated(Protocol):
    """A covariance matrix before it is evaluated."""

    def to_dense(self) -> Tensor:
        """Return the matrix (... x M x M)."""

    def diagonal(self) -> Tensor:
        """Return its diagonal (... x M or ... x 1)."""


class LazyCovariance(LinearOperator):
    """A covariance matrix of which nothing is computed before it is read.

    The diagonal costs the diagonal; the matrix is built when something else is asked for.

    :param shape: Its shape (... x M x M).
    """

    _is_lazy = True

    def __init__(self, shape: torch.Size, *args: Any):
        # What LinearOperator.__init__ sets
        self._args, self._differentiable_kwargs, self._nondifferentiable_kwargs = args, OrderedDict(), {}
        self._shape, self._is_grad_enabled = shape, torch.is_grad_enabled()

    @property
    def dtype(self) -> torch.dtype:
        return self._args[0].dtype

    @property
    def device(self) -> torch.device:
        return self._args[0].device

    def _size(self) -> torch.Size:
        return self._shape

    @property
    def requires_grad(self) -> bool:
        return self.to_dense().requires_grad

    @requires_grad.setter
    def requires_grad(self, val: bool) -> None:
        self._set_requires_grad(val)

    def _set_requires_grad(self, val: bool) -> None:
        covar = self.evaluate_kernel()
        covar._set_requires_grad(val)
        self._become(covar)

    def detach_(self) -> LinearOperator:
        self._become(self.evaluate_kernel().detach())
        return self

    def _become(self, covar: LinearOperator) -> None:
        add_to_cache(self, "kernel_eval", covar)
        self._diagonal, self._is_lazy = covar.diagonal, False  # it no longer comes from what it was made of

    def diagonal(self, offset: int = 0, dim1: int = -2, dim2: int = -1) -> Tensor:
        """See upstream's, which looks at the shape first."""
        is_whole = offset == 0 and {dim1, dim2} == {-2, -1}
        return self._diagonal() if is_whole else super().diagonal(offset, dim1, dim2)

    def to_dense(self) -> Tensor:
        return self.evaluate_kernel().to_dense()

    def representation(self) -> tuple[Tensor, ...]:
        return self.evaluate_kernel().representation()

    def representation_tree(self):
        return self.evaluate_kernel().representation_tree()

    def __reduce_ex__(self, protocol: int) -> tuple:
        return copy.copy, (self.evaluate_kernel(),)  # what is saved loads in any GPyTorch: as a dense operator

    def clone(self) -> LinearOperator:
        return self.evaluate_kernel().clone()

    def detach(self) -> LinearOperator:
        return self.evaluate_kernel().detach()

    def to(self, *args: Any, **kwargs: Any) -> LinearOperator:
        return self.evaluate_kernel().to(*args, **kwargs)

    def cpu(self) -> LinearOperator:
        return self.evaluate_kernel().cpu()

    def cuda(self, device_id: str | None = None) -> LinearOperator:
        return self.evaluate_kernel().cuda(device_id)

    def type(self, dtype: torch.dtype) -> LinearOperator:
        return self.evaluate_kernel().type(dtype)

    def _matmul(self, rhs: Tensor) -> Tensor:
        return self.evaluate_kernel()._matmul(rhs)

    def takes_scale(self, scale: Tensor | LinearOperator) -> bool:
        """Return whether the product with a diagonal matrix can be lazy: it needs no broadcasting, no other dtype."""
        return (
            self._is_lazy
            and isinstance(scale, DiagLinearOperator)
            and scale._diag.shape == self._shape[:-1]
            and scale._diag.dtype is self.dtype
        )

    def scaled(self, left: Tensor | None, right: Tensor | None) -> ScaledCovariance:
        """Return the product with diagonal matrices on both sides, as lazy as the matrix.

        :param left: The diagonal of the one on the left (... x M); None for none there.
        :param right: Likewise on the right.
        """
        return ScaledCovariance(left, self, right)

    def matmul(self, other: Tensor | LinearOperator) -> Tensor | LinearOperator:
        """See upstream's."""
        return self.scaled(None, other._diag) if self.takes_scale(other) else super().matmul(other)

    def _getitem(self, row_index, col_index, *batch_indices) -> LinearOperator:
        return self.evaluate_kernel()._getitem(row_index, col_index, *batch_indices)

    def _get_indices(self, row_index, col_index, *batch_indices) -> Tensor:
        return self.evaluate_kernel()._get_indices(row_index, col_index, *batch_indices)

    def _expand_batch(self, batch_shape: torch.Size) -> LinearOperator:
        return self.evaluate_kernel()._expand_batch(batch_shape)

    def _unsqueeze_batch(self, dim: int) -> LinearOperator:
        return self.evaluate_kernel()._unsqueeze_batch(dim)

    def _permute_batch(self, *dims: int) -> LinearOperator:
        return self.evaluate_kernel()._permute_batch(*dims)


class PosteriorCovariance(LazyCovariance):
    r"""
    :math:`\mathbf K_{**} - \mathbf K_{*X} (\mathbf L \mathbf L^\top)^{-1} \mathbf K_{X*}`.

    The diagonal costs the diagonal; the matrix is built when something else is asked for.

    :param prior: :math:`\mathbf K_{**}`, before it is evaluated.
    :param cross: Gives the rows of :math:`\mathbf K_{*X}` that a slice takes, or all (... x M x N).
    :param factor: :math:`\mathbf L` (... x N x N).
    :param shape: The shape of the whole (... x M x M).
    """

    def __init__(
        self,
        prior: Unevaluated,
        cross: Callable[[slice | None], Tensor],
        factor: CholeskyFactor,
        shape: torch.Size,
    ):
        super().__init__(shape, factor.blocks[0])
        self.prior, self.cross, self.factor = prior, cross, factor

    @cached(name="posterior_diagonal")
    def _diagonal(self) -> Tensor:
        with torch.set_grad_enabled(self._is_grad_enabled):
            blocks = row_blocks_of_tests(self._shape, self.factor.num_rows)
            explained = [explained_covariance(self.cross(rows), self.factor, is_diagonal=True) for rows in blocks]
            explained = explained[0] if len(explained) == 1 else torch.cat(explained, dim=-1)
            diagonal = self.prior.diagonal() - explained
            return diagonal if diagonal.shape == self._shape[:-1] else diagonal.expand(self._shape[:-1])

    @cached(name="kernel_eval")
    def evaluate_kernel(self) -> LinearOperator:
        if self._shape[-1] == 1:
            return DenseLinearOperator(self._diagonal().unsqueeze(-1))
        with torch.set_grad_enabled(self._is_grad_enabled):
            covar = self.prior.to_dense() - explained_covariance(self.cross(None), self.factor, is_diagonal=False)
            return DenseLinearOperator(covar if covar.shape == self._shape else covar.expand(self._shape))

    def _transpose_nonbatch(self) -> LinearOperator:
        return self


class ScaledCovariance(LazyCovariance):
    r"""
    :math:`\text{diag}(\mathbf l) \, \boldsymbol \Sigma \, \text{diag}(\mathbf r)`: a covariance matrix where both
    are the same, and a step to one where one of them is still missing.

    :param left: :math:`\mathbf l` (... x M); None for ones.
    :param covar: :math:`\boldsymbol \Sigma` (... x M x M).
    :param right: :math:`\mathbf r` (... x M); None for ones.
    """

    def __init__(self, left: Tensor | None, covar: LazyCovariance, right: Tensor | None):
        super().__init__(covar.shape, *covar._args)
        self.left, self.covar, self.right = left, covar, right

    def _diagonal(self) -> Tensor:
        diagonal = self.covar._diagonal()
        for scale in (self.left, self.right):
            diagonal = diagonal if scale is None else diagonal * scale
        return diagonal

    @cached(name="kernel_eval")
    def evaluate_kernel(self) -> LinearOperator:
        with torch.set_grad_enabled(self._is_grad_enabled):
            matrix = self.covar.to_dense()
            if self.left is not None:
                matrix = self.left.unsqueeze(-1) * matrix
            if self.right is not None:
                matrix = matrix * self.right.unsqueeze(-2)
            return DenseLinearOperator(matrix)

    def scaled(self, left: Tensor | None, right: Tensor | None) -> ScaledCovariance:
        with torch.set_grad_enabled(self._is_grad_enabled):
            return ScaledCovariance(_product(self.left, left), self.covar, _product(self.right, right))

    def _transpose_nonbatch(self) -> LinearOperator:
        return ScaledCovariance(self.right, self.covar, self.left)


def _product(scale: Tensor | None, other: Tensor | None) -> Tensor | None:
    return other if scale is None else scale if other is None else scale * other


@_upstream.replaces(DiagLinearOperator)
def matmul(self, other: Tensor | LinearOperator) -> Tensor | LinearOperator:
    """
    The product with a posterior covariance on tensors is as lazy as that is: an outcome transform of BoTorch's makes
    it at every prediction.
    """
    if isinstance(other, LazyCovariance) and other.takes_scale(self):
        return other.scaled(self._diag, None)
    return _upstream_matmul(self, other)
