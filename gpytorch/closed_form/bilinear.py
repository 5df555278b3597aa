"""The leaf for matrices A B A'^T of features of the points.

Such features are the labels of tasks, the inputs of a linear kernel, and a constant.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .parameters import Cotangents, Parameter
from .stationary import Rows


class Bilinear:
    r"""
    :math:`\mathbf P \mathbf B \mathbf P'^\top`, of tensors that are handed over when it is evaluated.

    :param rows: Where :math:`\mathbf P` stands among the tensors (... x N x T).
    :param cols: Where :math:`\mathbf P'` stands (... x M x T); `rows` for the covariance of points with themselves.
    :param covar: :math:`\mathbf B` (... x T x T).
    """

    __slots__ = ("cols", "covar", "rows")

    scale = None  # in the covariance already

    def __init__(self, rows: int, cols: int, covar: Parameter):
        self.rows, self.cols, self.covar = rows, cols, covar

    @property
    def slots(self) -> tuple[int, ...]:
        """Where the tensors stand that have a batch shape."""
        return self.rows, self.cols, self.covar.slot

    def size(self, values: Sequence[Tensor]) -> tuple[int, int]:
        """Return the number of rows and of columns.

        :param values: The tensors.
        """
        return values[self.rows].size(-2), values[self.cols].size(-2)

    def with_cols(self, cols: int) -> Bilinear:
        """Return the same between the points of the rows and others."""
        return Bilinear(self.rows, cols, self.covar)

    def hold(self, values: list[Tensor], with_cols: bool) -> None:
        """Put the features of the points and their covariance into memory of their own.

        :param values: The tensors.
        :param with_cols: Whether the columns are held, too.
        """
        for slot in {self.rows, self.cols} if with_cols else (self.rows,):
            values[slot] = values[slot].clone()
        self.covar.hold(values, with_cols)

    def evaluate(self, values: Sequence[Tensor], rows: Rows = None, cols: Rows = None) -> Tensor:
        """Return a block of the matrix by differentiable operations.

        :param values: The tensors.
        :param rows: The block's rows.
        :param cols: The block's columns.
        """
        left, right = self._sides(values, rows, cols)
        return left @ self.covar.of(values) @ right.mT

    def diagonal(self, values: Sequence[Tensor]) -> Tensor:
        """Return the diagonal of the covariance of the rows with themselves (... x N) by differentiable operations.

        :param values: The tensors.
        """
        left = values[self.rows]
        return (left @ self.covar.of(values) * left).sum(-1)

    # With K = P B P'^T and the cotangent G of K:
    #   dL/dB = P^T G P'        dL/dP = G P' B^T        dL/dP' = G^T P B

    def pull_back(
        self,
        cotangents: Cotangents,
        grad: Tensor,
        outer: Tensor | None,
        values: Sequence[Tensor],
        rows: Rows,
        cols: Rows,
    ) -> None:
        """
        Take the cotangent of a block back to the tensors.

        :param cotangents: Where they are summed.
        :param grad: The block's cotangent G (... x N x M).
        :param outer: What G is multiplied by (a scalar, or ... x 1 x 1), or None.
        :param values: The tensors.
        :param rows: The block's rows.
        :param cols: The block's columns.
        """
        needed = cotangents.needed
        if not (needed[self.covar.slot] or needed[self.rows] or needed[self.cols]):
            return
        left, right = self._sides(values, rows, cols)
        grad = grad.to(left.dtype)
        if needed[self.covar.slot]:
            total = left.mT @ grad @ right
            cotangents.add_of(self.covar, total if outer is None else total * outer)
        covar = self.covar.of(values)
        if outer is not None:
            covar = covar * outer
        if needed[self.rows]:
            cotangents.add(self.rows, grad @ (right @ covar.mT), rows)
        if needed[self.cols]:
            cotangents.add(self.cols, grad.mT @ (left @ covar), cols)

    def _sides(self, values: Sequence[Tensor], rows: Rows, cols: Rows) -> tuple[Tensor, Tensor]:
        left, right = values[self.rows], values[self.cols]
        return left if rows is None else left[..., rows, :], right if cols is None else right[..., cols, :]


def indicators(labels: Tensor, covar: Tensor) -> Tensor:
    r"""Return :math:`\mathbf P` (... x N x T), with a one where a point has a label.

    :param labels: The labels (... x N).
    :param covar: The covariance of the labels (... x T x T).
    :raises RuntimeError: If one is not among 0, ..., T - 1.
    """
    size = covar.size(-1)
    ones = torch.eye(size, dtype=covar.dtype, device=covar.device)
    return ones.gather(0, labels.reshape(-1, 1).expand(-1, size)).view(*labels.shape, size)
