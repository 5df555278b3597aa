"""The leaf for a matrix that a kernel's own `forward` has evaluated.

Its cotangent goes on into that kernel by autograd.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from .parameters import Cotangents
from .stationary import Rows


class Given:
    r"""
    A matrix :math:`\mathbf K` that is itself one of the tensors that are handed over: what a kernel without a closed
    form has evaluated. Its cotangent goes on into the kernel by autograd.

    :param slot: Where the matrix stands among the tensors (... x N x M).
    """

    __slots__ = ("slot",)

    scale = None  # as for every matrix; here in the matrix already

    def __init__(self, slot: int):
        self.slot = slot

    @property
    def slots(self) -> tuple[int, ...]:
        """Where the tensors stand that have a batch shape."""
        return (self.slot,)

    def size(self, values: Sequence[Tensor]) -> tuple[int, int]:
        """Return the number of rows and of columns.

        :param values: The tensors.
        """
        return tuple(values[self.slot].shape[-2:])

    def evaluate(self, values: Sequence[Tensor], rows: Rows = None, cols: Rows = None) -> Tensor:
        """Return a block of the matrix, in the matrix's memory.

        :param values: The tensors.
        :param rows: The block's rows.
        :param cols: The block's columns.
        """
        return _block(values[self.slot], rows, cols)

    def pull_back(
        self, cotangents: Cotangents, grad: Tensor, outer: Tensor | None, rows: Rows = None, cols: Rows = None
    ) -> None:
        """
        Take the cotangent of a block back to the matrix.

        :param cotangents: Where they are summed.
        :param grad: The block's cotangent G (... x N x M).
        :param outer: What G is multiplied by (a scalar, or ... x 1 x 1), or None.
        :param rows: The block's rows.
        :param cols: The block's columns.
        """
        if not cotangents.needed[self.slot]:
            return
        value = cotangents.values[self.slot]
        total = grad if outer is None else grad * outer
        total = total.to(value.dtype)
        if rows is cols is None:
            cotangents.add(self.slot, total)
            return
        if cotangents.sums[self.slot] is None:
            cotangents.sums[self.slot] = value.new_zeros(value.shape)
        target = _block(cotangents.sums[self.slot], rows, cols)
        target.add_(total.sum_to_size(target.shape))


def _block(matrix: Tensor, rows: Rows, cols: Rows) -> Tensor:
    matrix = matrix if rows is None else matrix[..., rows, :]
    return matrix if cols is None else matrix[..., cols]
