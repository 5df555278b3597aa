"""The covariance of test points with the training points, asked for rows and products. The strategy makes it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .._shapes import broadcast_shapes, matmul
from ..closed_form.covariance import ClosedForm
from ..closed_form.kernels import Terms
from ..functions.shared_rows import SharedRowsOfModel, num_shared, shared_product
from .unevaluated import Evaluated

# Elements of K(test, train) that are held at once. Larger sets of test points go through in blocks.
BLOCK_ELEMENTS = 2**22

# A product with the rows that are the same in a whole batch, differentiated without a matrix for each of the batch,
# multiplies by up to so many columns for each of the batch: the rows of A times the coordinates, and one.
MANY_COLUMNS = 2**6


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


class EvaluatedRows:
    """A matrix of which rows and products are asked for.

    :param matrix: The matrix (... x M x N).
    """

    blocks: Sequence[slice | None] = (None,)
    first_own = 0

    def __init__(self, matrix: Tensor) -> None:
        self.matrix = matrix

    def rows(self, rows: slice | None = None) -> Tensor:
        """See :meth:`CrossCovariance.rows`."""
        return self.matrix if rows is None else self.matrix[..., rows, :]

    def product(self, left: Tensor, rows: slice | None = None) -> Tensor:
        """See :meth:`CrossCovariance.product`."""
        return left @ self.rows(rows).mT

    def at(self, rows: Tensor) -> EvaluatedRows:
        """See :meth:`CrossCovariance.at`."""
        return EvaluatedRows(self.matrix.index_select(-2, rows))


class CrossCovariance:
    r"""
    :math:`\mathbf K_{*X}` (... x M x N): evaluated at once, or again for each block of many rows that is read.

    Rows that are the same in a whole batch, as those of points that come with each candidate, are evaluated once for
    all of the batch, and remembered from call to call.

    :param covar: The matrix, before it is evaluated.
    :param shared: What the model remembers of such rows.
    :param is_read_later: Whether more than the product with one vector, at once, may be read.
    :ivar blocks: The blocks in which all rows should be asked for.
    :ivar first_own: The number of rows that are the same in the whole batch: the others are at hand.
    """

    def __init__(self, covar: ClosedForm | Evaluated, shared: SharedRowsOfModel, is_read_later: bool) -> None:
        self.covar, self.shape, self.first_own = covar, covar.shape, 0
        self.blocks = row_blocks_of_tests(self.shape, self.shape[-1])
        self._all: Tensor | None = None
        terms = covar.terms
        if is_read_later and terms is not None:
            num_rows = num_shared(terms.expression, terms.values, terms.row_slots)
            own = torch.Size((*self.shape[:-2], self.shape[-2] - num_rows, self.shape[-1]))
            if max(own.numel(), num_rows * self.shape[-1]) > BLOCK_ELEMENTS:
                num_rows = 0
            terms.hold(with_cols=num_rows > 0 or len(self.blocks) > 1)  # an optimizer may step before it is read
            if num_rows > 0:
                self._share(terms, num_rows, shared)
                return
        if len(self.blocks) == 1:
            self._all = covar.to_dense()

    def _share(self, terms: Terms, num_rows: int, shared: SharedRowsOfModel) -> None:
        alone, each = list(terms.values), list(terms.values)
        for slot in terms.row_slots:
            each[slot] = each[slot][..., :num_rows, :]
            alone[slot] = each[slot][(0,) * (each[slot].dim() - 2)]
        self.first_own, self._values, self._row_slots = num_rows, each, terms.row_slots
        self._width = 1 + max(each[slot].size(-1) for slot in terms.row_slots)
        self._shared = shared.of(terms.expression, alone)
        self._own = self.covar.to_dense(slice(num_rows, None)) if num_rows < self.shape[-2] else None

    def rows(self, rows: slice | None = None) -> Tensor:
        """Return some of the rows (... x R x N), or all.

        :param rows: The rows, from one number to another.
        """
        if self._all is None and rows is not None:
            if rows.start >= self.first_own > 0:
                return self._own[..., rows.start - self.first_own : rows.stop - self.first_own, :]
            return self.covar.to_dense(rows)
        if self._all is None:
            self._all = self.covar.to_dense()
        return self._all if rows is None else self._all[..., rows, :]

    def product(self, left: Tensor, rows: slice | None = None) -> Tensor:
        r"""Return :math:`\mathbf A \mathbf K_{*X}^\top` (... x R x M), or some of its columns.

        :param left: :math:`\mathbf A` (... x R x N).
        :param rows: The rows of :math:`\mathbf K_{*X}`, from one number to another.
        """
        first, last = (0, self.shape[-2]) if rows is None else (rows.start, rows.stop)
        parts = []
        if self._all is None and first < self.first_own and left.size(-2) * self._width <= MANY_COLUMNS:
            batch_shape = broadcast_shapes(self.shape[:-2], left.shape[:-2])
            part = shared_product(left, self._shared, self._values, self._row_slots, batch_shape)
            parts.append(part[..., first : min(last, self.first_own)])
            first = self.first_own
        for block in self.blocks:
            start, stop = (0, self.shape[-2]) if block is None else (block.start, block.stop)
            start, stop = max(first, start), min(last, stop)
            if start < stop:
                parts.append(matmul(left, self.rows(slice(start, stop)).mT))
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)

    def times(self, vector: Tensor) -> Tensor:
        r"""Return :math:`\mathbf K_{*X} \mathbf v` (... x M).

        :param vector: :math:`\mathbf v` (... x N).
        """
        if self._all is not None:
            return self._all @ vector if vector.dim() == 1 else matmul(self._all, vector.unsqueeze(-1)).squeeze(-1)
        return self.product(vector.unsqueeze(-2)).squeeze(-2)

    def at(self, rows: Tensor) -> EvaluatedRows:
        """Return some of the rows.

        :param rows: Their numbers.
        """
        if self._all is None:
            return EvaluatedRows(self.covar.at_rows(rows).to_dense())
        return EvaluatedRows(self._all.index_select(-2, rows))
