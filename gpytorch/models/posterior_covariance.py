"""The posterior covariance of an exact GP, of which nothing is computed before it is read, and then only that part."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Protocol

import torch
from linear_operator.operators import (
    AddedDiagLinearOperator,
    CatLinearOperator,
    DenseLinearOperator,
    DiagLinearOperator,
    LinearOperator,
)
from torch import Tensor

from .. import _upstream
from .._transforms import is_transformed
from ..closed_form.covariance import ClosedFormPrior
from ..functions.explained_covariance import explained_covariance
from ..utils.memoize import add_to_cache, cached
from .cholesky_factor import CholeskyFactor
from .cross_covariance import CrossCovariance, EvaluatedRows
from .unevaluated import Evaluated

_upstream_diag_matmul, _upstream_cat_matmul = DiagLinearOperator.matmul, CatLinearOperator.matmul
_upstream_added_diag_matmul = AddedDiagLinearOperator.matmul

#: Which rows or columns of a matrix are meant, by their numbers.
Numbers = range | Tensor

# A view of a tensor's batch dimensions, given how many others there are behind them.
View = Callable[[Tensor, int], Tensor]


class Source(Protocol):
    """What a covariance matrix is read from (... x M x M)."""

    def block(self, rows: Numbers, cols: Numbers) -> Tensor:
        """Return what is in these rows and columns."""

    def diagonal_at(self, rows: Numbers) -> Tensor:
        """Return the diagonal in these rows."""


class Conditional:
    r"""
    :math:`\mathbf K_{**} - \mathbf K_{*X} (\mathbf L \mathbf L^\top)^{-1} \mathbf K_{X*}`, or any part of it:

    .. math::
        \boldsymbol \Sigma_{RC} = \mathbf K_{RC}
        - \left( \mathbf K_{RX} \mathbf L^{-\top} \mathbf L^{-1} \right) \mathbf K_{XC},

    whichever of rows and columns are fewer in the place of R.

    :param prior: :math:`\mathbf K_{**}`, before it is evaluated.
    :param cross: :math:`\mathbf K_{*X}` (... x M x N).
    :param factor: :math:`\mathbf L` (... x N x N).
    :param shape: The shape of the whole (... x M x M).
    """

    def __init__(
        self,
        prior: ClosedFormPrior | Evaluated,
        cross: CrossCovariance | EvaluatedRows,
        factor: CholeskyFactor,
        shape: torch.Size,
    ) -> None:
        self.prior, self.cross, self.factor, self.shape = prior, cross, factor, shape
        self._is_grad_enabled = torch.is_grad_enabled()
        self._whole: Tensor | None = None
        self._diagonal: Tensor | None = None
        # The last block that was read: the outputs of a model are read one by one, and are one block
        self._last: tuple[tuple[range, range], Tensor] | None = None

    def block(self, rows: Numbers, cols: Numbers) -> Tensor:
        """Return what is in some rows and columns.

        :param rows: The rows' numbers.
        :param cols: The columns' numbers.
        """
        if self._is_of_all(rows) and self._is_of_all(cols):
            return self.whole()
        if self._whole is not None:
            return _taken(self._whole, rows, cols)
        key = rows, cols
        if self._last is not None and _is_same(self._last[0], key):
            return self._last[1]
        with torch.set_grad_enabled(self._is_grad_enabled):
            if _is_slice(rows) and _is_slice(cols):
                block = self._between(slice(rows.start, rows.stop), slice(cols.start, cols.stop))
            else:
                block = self._gathered(rows, cols)
        self._last = key, block
        return block

    def whole(self) -> Tensor:
        """Return the whole matrix."""
        if self._whole is None:
            with torch.set_grad_enabled(self._is_grad_enabled):
                if self.shape[-1] == 1:
                    self._whole = self.diagonal().unsqueeze(-1)
                else:
                    explained = explained_covariance(self.cross.rows(), self.factor, is_diagonal=False)
                    self._whole = self._expanded(self.prior.to_dense() - explained)
        return self._whole

    def diagonal(self) -> Tensor:
        """Return the whole diagonal."""
        if self._diagonal is None:
            cross, factor, shape = self.cross, self.factor, self.shape[:-1]
            with torch.set_grad_enabled(self._is_grad_enabled):
                explained = [explained_covariance(cross.rows(rows), factor, is_diagonal=True) for rows in cross.blocks]
                explained = explained[0] if len(explained) == 1 else torch.cat(explained, dim=-1)
                diagonal = self.prior.diagonal() - explained
                self._diagonal = diagonal if diagonal.shape == shape else diagonal.expand(shape)
        return self._diagonal

    def diagonal_at(self, rows: Numbers) -> Tensor:
        """Return the diagonal in some rows.

        :param rows: The rows' numbers.
        """
        return self.diagonal() if self._is_of_all(rows) else self._at(_tensor(rows, self.factor)).diagonal()

    def _is_of_all(self, numbers: Numbers) -> bool:
        return type(numbers) is range and numbers == range(self.shape[-1])

    def _expanded(self, block: Tensor) -> Tensor:
        batch_shape = self.shape[:-2]
        return block if block.shape[:-2] == batch_shape else block.expand(*batch_shape, *block.shape[-2:])

    def _between(self, rows: slice, cols: slice) -> Tensor:
        num_rows, num_cols = rows.stop - rows.start, cols.stop - cols.start
        if num_rows > num_cols:
            return self._between(cols, rows).mT
        cross, factor, prior = self.cross, self.factor, self.prior.block(rows, cols)
        first, last = min(rows.start, cols.start), max(rows.stop, cols.stop)
        if rows == cols:
            explained = explained_covariance(cross.rows(rows), factor, is_diagonal=False)
        elif 2 * num_rows > last - first and first >= cross.first_own:
            # One solve for all is less work than two for the rows.
            half = factor.half_solve(cross.rows(slice(first, last)).mT)
            left, right = (half[..., part.start - first : part.stop - first] for part in (rows, cols))
            explained = left.mT @ right
        else:
            explained = cross.product(factor.solve(cross.rows(rows).mT).mT, cols)
        return self._expanded(prior - explained)

    def _gathered(self, rows: Numbers, cols: Numbers) -> Tensor:
        # Points of rows alone, of both, and of columns alone: then rows and columns are slices, and which points are
        # the same in both is as well known as of the whole.
        numbers = [_tensor(part, self.factor) for part in (rows, cols)]
        is_row, is_col = (torch.zeros(self.shape[-1], dtype=torch.bool, device=part.device) for part in numbers)
        is_row[numbers[0]], is_col[numbers[1]] = True, True
        parts = [mask.nonzero().squeeze(-1) for mask in (is_row & ~is_col, is_row & is_col, is_col & ~is_row)]
        order = torch.cat(parts)
        place = torch.empty_like(is_row, dtype=torch.long)
        place[order] = torch.arange(len(order), device=order.device)
        num_rows, first_col = len(parts[0]) + len(parts[1]), len(parts[0])
        block = self._at(order)._between(slice(0, num_rows), slice(first_col, len(order)))
        return _taken(block, place[numbers[0]], place[numbers[1]] - first_col)

    def _at(self, rows: Tensor) -> Conditional:
        shape = torch.Size((*self.shape[:-2], len(rows), len(rows)))
        with torch.set_grad_enabled(self._is_grad_enabled):
            return Conditional(self.prior.at(rows), self.cross.at(rows), self.factor, shape)


class LazyCovariance(LinearOperator):
    """A covariance matrix of which nothing is computed before it is read, and then only the part that is.

    A subclass has `_diagonal`, `evaluate_kernel` and `_transpose_nonbatch`, and is read from a :attr:`source`.

    :param shape: Its shape (... x M x M).
    """

    _is_lazy = True

    def __init__(self, shape: torch.Size, *args: Any):
        # What LinearOperator.__init__ sets
        self._args, self._differentiable_kwargs, self._nondifferentiable_kwargs = args, OrderedDict(), {}
        self._shape, self._is_grad_enabled = shape, torch.is_grad_enabled()

    @property
    def source(self) -> Source:
        """What parts of the matrix are read from."""
        return self

    def block(self, rows: Numbers, cols: Numbers) -> Tensor:
        """See :meth:`Source.block`."""
        return _taken(self.to_dense(), rows, cols)

    def diagonal_at(self, rows: Numbers) -> Tensor:
        """See :meth:`Source.diagonal_at`."""
        return _taken(self._diagonal(), rows)

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
        is_whole = offset == 0 and {dim1, dim2} == {-2, -1} and self._shape[-2] == self._shape[-1]
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

    def repeat(self, *sizes: int) -> LinearOperator:
        return self.evaluate_kernel().repeat(*sizes)

    def _matmul(self, rhs: Tensor) -> Tensor:
        return self.evaluate_kernel()._matmul(rhs)

    def _part(self) -> CovariancePart:
        """Return all of it, as a part."""
        rows, cols = (range(size) for size in self._shape[-2:])
        return CovariancePart(self, rows, cols, self._args[0].new_empty(()).expand(self._shape[:-2]))

    def takes_scale(self, scale: LinearOperator, is_left: bool) -> bool:
        """Return whether the product with a diagonal matrix can be lazy: it needs no broadcasting, no other dtype.

        :param scale: The diagonal matrix.
        :param is_left: Whether it stands on the left.
        """
        size = self._shape[-2] if is_left else self._shape[-1]
        return (
            self._is_lazy
            and isinstance(scale, DiagLinearOperator)
            and scale._diag.shape == (*self._shape[:-2], size)
            and scale._diag.dtype is self.dtype
        )

    def scaled(self, left: Tensor | None, right: Tensor | None) -> CovariancePart:
        """Return the product with diagonal matrices on both sides, as lazy as the matrix.

        :param left: The diagonal of the one on the left (... x M); None for none there.
        :param right: Likewise on the right.
        """
        return self._part().scaled(left, right)

    def matmul(self, other: Tensor | LinearOperator) -> Tensor | LinearOperator:
        """See upstream's."""
        res = None if isinstance(other, Tensor) else _scaled(self, other, is_left=False)
        return super().matmul(other) if res is None else res

    def _getitem(self, row_index, col_index, *batch_indices) -> LinearOperator:
        if not self._is_lazy or not (_is_taken(row_index) and _is_taken(col_index)):
            return self.evaluate_kernel()._getitem(row_index, col_index, *batch_indices)
        return self._part().selected(row_index, col_index, batch_indices)

    def _get_indices(self, row_index, col_index, *batch_indices) -> Tensor:
        if not self._is_lazy or is_transformed():
            return self.evaluate_kernel()._get_indices(row_index, col_index, *batch_indices)
        sizes = self._shape[-2:]
        (rows, row), (cols, col) = (
            torch.unique(torch.arange(size, device=index.device)[index], return_inverse=True)
            for size, index in zip(sizes, (row_index, col_index), strict=True)
        )
        return self._part().selected(rows, cols, ()).to_dense()[(*batch_indices, row, col)]

    def _expand_batch(self, batch_shape: torch.Size) -> LinearOperator:
        if not self._is_lazy:
            return self.evaluate_kernel()._expand_batch(batch_shape)
        return self._part().viewed(partial(_expanded, batch_shape=tuple(batch_shape)))

    def _unsqueeze_batch(self, dim: int) -> LinearOperator:
        if not self._is_lazy:
            return self.evaluate_kernel()._unsqueeze_batch(dim)
        return self._part().viewed(partial(_unsqueezed, dim=dim))

    def _permute_batch(self, *dims: int) -> LinearOperator:
        if not self._is_lazy:
            return self.evaluate_kernel()._permute_batch(*dims)
        return self._part().viewed(partial(_permuted, dims=dims))


class PosteriorCovariance(LazyCovariance):
    r"""
    :math:`\mathbf K_{**} - \mathbf K_{*X} (\mathbf L \mathbf L^\top)^{-1} \mathbf K_{X*}`.

    The diagonal costs the diagonal, and a part the part.

    :param prior: :math:`\mathbf K_{**}`, before it is evaluated.
    :param cross: :math:`\mathbf K_{*X}` (... x M x N).
    :param factor: :math:`\mathbf L` (... x N x N).
    :param shape: The shape of the whole (... x M x M).
    """

    def __init__(
        self, prior: ClosedFormPrior | Evaluated, cross: CrossCovariance, factor: CholeskyFactor, shape: torch.Size
    ):
        super().__init__(shape, factor.blocks[0])
        self._source = Conditional(prior, cross, factor, shape)

    @property
    def source(self) -> Conditional:
        """See :attr:`LazyCovariance.source`."""
        return self._source

    def _diagonal(self) -> Tensor:
        return self._source.diagonal()

    @cached(name="kernel_eval")
    def evaluate_kernel(self) -> LinearOperator:
        return DenseLinearOperator(self._source.whole())

    def _transpose_nonbatch(self) -> LinearOperator:
        return self


class CovariancePart(LazyCovariance):
    r"""
    :math:`\text{diag}(\mathbf l) \, \boldsymbol \Sigma_{RC} \, \text{diag}(\mathbf r)`, of which the batch dimensions
    may be another view.

    :param covar: :math:`\boldsymbol \Sigma` (... x M x M), or a part of it.
    :param rows: The numbers of the rows R among those of :math:`\boldsymbol \Sigma`.
    :param cols: The numbers of the columns C.
    :param batch: Any tensor of the batch shape.
    :param views: What makes the batch dimensions of the part from those of :math:`\boldsymbol \Sigma`.
    :param left: :math:`\mathbf l` (... x R); None for ones.
    :param right: :math:`\mathbf r` (... x C); None for ones.
    """

    def __init__(
        self,
        covar: LazyCovariance,
        rows: Numbers,
        cols: Numbers,
        batch: Tensor,
        views: tuple[View, ...] = (),
        left: Tensor | None = None,
        right: Tensor | None = None,
    ):
        super().__init__(torch.Size((*batch.shape, len(rows), len(cols))), *covar._args)
        self._source = covar.source
        self.rows, self.cols, self.batch, self.views, self.left, self.right = rows, cols, batch, views, left, right

    @property
    def source(self) -> Source:
        """See :attr:`LazyCovariance.source`."""
        return self._source

    def _part(self) -> CovariancePart:
        return self

    def block(self, rows: Numbers, cols: Numbers) -> Tensor:
        """See :meth:`Source.block`."""
        return self.selected(_index(rows), _index(cols), ()).to_dense()

    def _diagonal(self) -> Tensor:
        if not _is_same(self.rows, self.cols):
            return self.to_dense().diagonal(dim1=-2, dim2=-1)
        diagonal = self._source.diagonal_at(self.rows)
        for view in self.views:
            diagonal = view(diagonal, 1)
        for scale in (self.left, self.right):
            diagonal = diagonal if scale is None else diagonal * scale
        return self._as_made(diagonal)

    @cached(name="kernel_eval")
    def evaluate_kernel(self) -> LinearOperator:
        block = self._source.block(self.rows, self.cols)
        with torch.set_grad_enabled(self._is_grad_enabled):
            for view in self.views:
                block = view(block, 2)
            if self.left is not None:
                block = self.left.unsqueeze(-1) * block
            if self.right is not None:
                block = block * self.right.unsqueeze(-2)
        return DenseLinearOperator(self._as_made(block))

    def _as_made(self, tensor: Tensor) -> Tensor:
        # A part that is taken without gradients has none, though the whole may have
        return tensor.detach() if tensor.requires_grad and not self._is_grad_enabled else tensor

    def selected(self, row_index: slice | Tensor, col_index: slice | Tensor, batch_indices: Sequence) -> CovariancePart:
        """Return a part of the part.

        :param row_index: The rows of it.
        :param col_index: The columns of it.
        :param batch_indices: What is taken of each batch dimension.
        """
        part = self
        if any(index != _ALL if isinstance(index, slice) else True for index in batch_indices):
            part = part.viewed(partial(_indexed, index=tuple(batch_indices)))
        rows, cols = _selected(self.rows, row_index), _selected(self.cols, col_index)
        left, right = (
            scale if scale is None else scale[..., index]
            for scale, index in ((part.left, row_index), (part.right, col_index))
        )
        return CovariancePart(self, rows, cols, part.batch, part.views, left, right)

    def viewed(self, view: View) -> CovariancePart:
        """Return the part with another view of its batch dimensions.

        :param view: The view.
        """
        left, right = (scale if scale is None else view(scale, 1) for scale in (self.left, self.right))
        return CovariancePart(self, self.rows, self.cols, view(self.batch, 0), (*self.views, view), left, right)

    def scaled(self, left: Tensor | None, right: Tensor | None) -> CovariancePart:
        """See :meth:`LazyCovariance.scaled`."""
        left, right = _product(self.left, left), _product(self.right, right)
        return CovariancePart(self, self.rows, self.cols, self.batch, self.views, left, right)

    def _transpose_nonbatch(self) -> LinearOperator:
        if not self._is_lazy:
            return self.evaluate_kernel()._transpose_nonbatch()
        return CovariancePart(self, self.cols, self.rows, self.batch, self.views, self.right, self.left)


_ALL = slice(None)


def _is_slice(numbers: Numbers) -> bool:
    return type(numbers) is range and numbers.step == 1


def _is_same(left: Any, right: Any) -> bool:
    if type(left) is tuple:
        return all(map(_is_same, left, right))
    return left is right or (type(left) is range and type(right) is range and left == right)


def _is_taken(index: Any) -> bool:
    if isinstance(index, slice):
        return index.step is None or index.step > 0
    return isinstance(index, Tensor) and index.dim() == 1 and index.dtype is torch.long


def _index(numbers: Numbers) -> slice | Tensor:
    return slice(numbers.start, numbers.stop, numbers.step) if type(numbers) is range else numbers


def _tensor(numbers: Numbers, factor: CholeskyFactor) -> Tensor:
    if type(numbers) is range:
        return torch.arange(numbers.start, numbers.stop, numbers.step, device=factor.blocks[0].device)
    return numbers


def _selected(numbers: Numbers, index: slice | Tensor) -> Numbers:
    if isinstance(index, Tensor) and type(numbers) is range:
        numbers = torch.arange(numbers.start, numbers.stop, numbers.step, device=index.device)
    return numbers[index]


def _taken(tensor: Tensor, *numbers: Numbers) -> Tensor:
    # Along the last dimensions
    for dim, part in enumerate(numbers, start=-len(numbers)):
        if type(part) is not range:
            tensor = tensor.index_select(dim, part.to(tensor.device))
        elif part != range(tensor.size(dim)):
            tensor = tensor[(..., _index(part), *(_ALL,) * (-1 - dim))]
    return tensor


def _expanded(tensor: Tensor, event_dim: int, batch_shape: tuple[int, ...]) -> Tensor:
    return tensor.expand(*batch_shape, *tensor.shape[tensor.dim() - event_dim :])


def _unsqueezed(tensor: Tensor, event_dim: int, dim: int) -> Tensor:
    return tensor.unsqueeze(dim)


def _permuted(tensor: Tensor, event_dim: int, dims: tuple[int, ...]) -> Tensor:
    return tensor.permute(*dims, *range(len(dims), tensor.dim()))


def _indexed(tensor: Tensor, event_dim: int, index: tuple) -> Tensor:
    return tensor[index]


def _product(scale: Tensor | None, other: Tensor | None) -> Tensor | None:
    return other if scale is None else scale if other is None else scale * other


def _scaled(covar: LinearOperator, scale: LinearOperator, is_left: bool) -> LinearOperator | None:
    """Return the product with a diagonal matrix where it can be lazy: of posterior covariances, of these with noise,
    and of several in a batch.

    :param covar: The matrix.
    :param scale: The diagonal matrix.
    :param is_left: Whether it stands on the left.
    """
    if isinstance(covar, LazyCovariance):
        if not covar.takes_scale(scale, is_left):
            return None
        return covar.scaled(scale._diag, None) if is_left else covar.scaled(None, scale._diag)
    if not isinstance(scale, DiagLinearOperator):
        return None
    if type(covar) is AddedDiagLinearOperator:
        scaled = _scaled(covar._linear_op, scale, is_left)
        return None if scaled is None else AddedDiagLinearOperator(scaled, scale @ covar._diag_tensor)
    if type(covar) is CatLinearOperator and covar.cat_dim < -2 and scale._diag.dim() == covar.dim() - 1:
        dim = covar.cat_dim + 1
        sizes = [part.size(covar.cat_dim) for part in covar.linear_ops]
        if scale._diag.size(dim) != sum(sizes):
            return None
        scales = map(DiagLinearOperator, scale._diag.split(sizes, dim))
        parts = [_scaled(part, own, is_left) for part, own in zip(covar.linear_ops, scales, strict=True)]
        if None not in parts:
            return CatLinearOperator(*parts, dim=covar.cat_dim, output_device=covar.output_device)
    return None


@_upstream.replaces(DiagLinearOperator)
def matmul(self, other: Tensor | LinearOperator) -> Tensor | LinearOperator:
    """
    The product with a posterior covariance on tensors is as lazy as that is: an outcome transform of BoTorch's makes
    it at every prediction.
    """
    res = None if isinstance(other, Tensor) else _scaled(other, self, is_left=True)
    return _upstream_diag_matmul(self, other) if res is None else res


@_upstream.replaces(CatLinearOperator, "matmul")
def cat_matmul(self, other: Tensor | LinearOperator) -> Tensor | LinearOperator:
    """The product with a diagonal matrix is as lazy as what is put together, if that are posterior covariances."""
    res = None if isinstance(other, Tensor) else _scaled(self, other, is_left=False)
    return _upstream_cat_matmul(self, other) if res is None else res


@_upstream.replaces(AddedDiagLinearOperator, "matmul")
def added_diag_matmul(self, other: Tensor | LinearOperator) -> Tensor | LinearOperator:
    """The product with a diagonal matrix is as lazy as what noise is added to, if that is a posterior covariance."""
    res = None if isinstance(other, Tensor) else _scaled(self, other, is_left=False)
    return _upstream_added_diag_matmul(self, other) if res is None else res
