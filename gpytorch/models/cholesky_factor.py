r"""The Cholesky factor of a training covariance, whole or bordered by the rows of new points.

.. math::
    \begin{pmatrix} \mathbf K & \mathbf U \\ \mathbf U^\top & \mathbf S \end{pmatrix} = \begin{pmatrix}
    \mathbf L & \\ \mathbf B & \mathbf C \end{pmatrix} \begin{pmatrix} \mathbf L^\top & \mathbf B^\top \\
    & \mathbf C^\top \end{pmatrix}, \qquad
    \mathbf B^\top = \mathbf L^{-1} \mathbf U, \qquad
    \mathbf C \mathbf C^\top = \mathbf S - \mathbf B \mathbf B^\top.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from linear_operator.utils.cholesky import psd_safe_cholesky
from torch import Tensor

from .._shapes import as_columns, broadcast_shapes


class CholeskyFactor:
    r"""
    :math:`\mathbf L` as one tensor.

    :param tensor: The factor (... x N x N).
    """

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor

    @property
    def blocks(self) -> tuple[Tensor, ...]:
        """The tensors that the factor is made of."""
        return (self.tensor,)

    @property
    def num_rows(self) -> int:
        """N."""
        return self.tensor.size(-1)

    def half_solve(self, rhs: Tensor) -> Tensor:
        r"""Return :math:`\mathbf L^{-1} \mathbf R`, of the broadcast batch shape.

        :param rhs: :math:`\mathbf R` (... x N x S).
        """
        columns, restore = self._side_by_side(rhs)
        return restore(torch.linalg.solve_triangular(self.tensor, columns, upper=False))

    def back_solve(self, rhs: Tensor) -> Tensor:
        r"""Return :math:`\mathbf L^{-\top} \mathbf R`, of the broadcast batch shape.

        :param rhs: :math:`\mathbf R` (... x N x S).
        """
        columns, restore = self._side_by_side(rhs)
        return restore(torch.linalg.solve_triangular(self.tensor.mT, columns, upper=True))

    def solve(self, rhs: Tensor) -> Tensor:
        r"""Return :math:`(\mathbf L \mathbf L^\top)^{-1} \mathbf R`, of the broadcast batch shape.

        :param rhs: :math:`\mathbf R` (... x N x S).
        """
        # Not torch.cholesky_solve, which copies the factor at every call.
        columns, restore = self._side_by_side(rhs)
        half = torch.linalg.solve_triangular(self.tensor, columns, upper=False)
        return restore(torch.linalg.solve_triangular(self.tensor.mT, half, upper=True))

    def detach(self) -> CholeskyFactor:
        """Return the factor without its gradient."""
        return CholeskyFactor(self.tensor.detach())

    def _side_by_side(self, rhs: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        return as_columns(self.tensor.shape[:-2], rhs)


class BorderedFactor(CholeskyFactor):
    r"""
    :math:`\mathbf L` with more rows below, which may be of a larger batch. :math:`\mathbf L` is kept once.

    :param first: :math:`\mathbf L` (... x N x N), itself bordered or not.
    :param left: :math:`\mathbf B` (... x M x N).
    :param corner: :math:`\mathbf C` (... x M x M).
    """

    def __init__(self, first: CholeskyFactor, left: Tensor, corner: Tensor) -> None:
        self.first, self.left, self.corner = first, left, CholeskyFactor(corner)

    @property
    def blocks(self) -> tuple[Tensor, ...]:
        """See :attr:`CholeskyFactor.blocks`."""
        return (*self.first.blocks, self.left, self.corner.tensor)

    @property
    def num_rows(self) -> int:
        """N + M."""
        return sum(self.left.shape[-2:])

    def half_solve(self, rhs: Tensor) -> Tensor:
        """See :meth:`CholeskyFactor.half_solve`."""
        upper, lower = self._split(rhs)
        upper = self.first.half_solve(upper)
        return _below(upper, self.corner.half_solve(lower - self.left @ upper))

    def back_solve(self, rhs: Tensor) -> Tensor:
        """See :meth:`CholeskyFactor.back_solve`."""
        upper, lower = self._split(rhs)
        lower = self.corner.back_solve(lower)
        return _below(self.first.back_solve(upper - self.left.mT @ lower), lower)

    def solve(self, rhs: Tensor) -> Tensor:
        """See :meth:`CholeskyFactor.solve`."""
        return self.back_solve(self.half_solve(rhs))

    def detach(self) -> BorderedFactor:
        """See :meth:`CholeskyFactor.detach`."""
        return BorderedFactor(self.first.detach(), self.left.detach(), self.corner.tensor.detach())

    def _split(self, rhs: Tensor) -> tuple[Tensor, Tensor]:
        num_rows = self.left.size(-1)
        return rhs[..., :num_rows, :], rhs[..., num_rows:, :]


def border(factor: CholeskyFactor, cross: Tensor, covar: Tensor) -> BorderedFactor:
    r"""Return the factor of a covariance with the rows and columns of new points added.

    :param factor: :math:`\mathbf L` (... x N x N).
    :param cross: :math:`\mathbf U^\top`, of the new points with the old ones (... x M x N).
    :param covar: :math:`\mathbf S`, of the new points with themselves, and their noise (... x M x M).
    :raises ~linear_operator.utils.errors.NotPSDError: If no jitter makes the Schur complement positive definite.
    """
    half = factor.half_solve(cross.mT)
    return BorderedFactor(factor, half.mT, psd_safe_cholesky(covar - half.mT @ half))


def _below(upper: Tensor, lower: Tensor) -> Tensor:
    if upper.shape[:-2] != lower.shape[:-2]:
        batch_shape = broadcast_shapes(upper.shape[:-2], lower.shape[:-2])
        upper, lower = (part.expand(*batch_shape, *part.shape[-2:]) for part in (upper, lower))
    return torch.cat([upper, lower], dim=-2)
