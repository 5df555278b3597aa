"""The squared differences of a few points, and the points of many less their mean."""

from __future__ import annotations

from torch import Tensor

from .remembered import remembered

# Up to the first number of differences of coordinates it is less work to take them all than to set up a matrix product
# for the distances; up to the second, to go through those that are remembered.
FEW, FEW_AGAIN = 2**13, 2**16

# Up to this number of coordinates it is less work to compare points than to center them.
MANY = 2**16


def squared_differences(x: Tensor) -> Tensor:
    r"""
    Return :math:`(x_{id} - x_{jd})^2` with the elements :math:`ij` in a row.

    :param x: The points (... x N x D).
    :return: The squared differences (... x D x N^2).
    """
    coordinates = x.mT.contiguous()  # for the differences to lie in rows
    return (coordinates.unsqueeze(-1) - coordinates.unsqueeze(-2)).square_().flatten(-2, -1)


def centered(x: Tensor) -> tuple[Tensor, Tensor]:
    r"""
    Return the mean of the points, as a constant, and the points less their mean.

    :param x: The points (... x N x D).
    """
    origin = x.detach().mean(-2, keepdim=True)
    return origin, x - origin


remembered_squared_differences = remembered(squared_differences)
remembered_centered = remembered(centered)
