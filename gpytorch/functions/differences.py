"""The squared differences of a few points, which are the same at every step of a training."""

from __future__ import annotations

import torch
from torch import Tensor

# Up to the first number of differences of coordinates it is less work to take them all than to set up a matrix product
# for the distances; up to the second, to go through those that are kept.
FEW, FEW_AGAIN = 2**13, 2**16

# The last sets of points on a CPU, of which a fit asks again and again, and their differences. Only ever replaced as a
# whole, so that threads can share it.
_NUM_KEPT = 4
_kept: tuple[tuple[Tensor, Tensor], ...] = ()


def squared_differences(x: Tensor, again: bool) -> Tensor:
    r"""
    Return :math:`(x_{id} - x_{jd})^2`, which is not to be written to, with the elements :math:`ij` in a row.

    :param x: The points (... x N x D), without a gradient.
    :param again: Whether the same points are likely to be asked for again.
    :return: The squared differences (... x D x N^2).
    """
    global _kept
    again = again and x.is_cpu and type(x) is Tensor  # elsewhere the comparison would wait for the device
    if again:
        for points, differences in _kept:
            if points.dtype is x.dtype and torch.equal(points, x):
                return differences
    coordinates = x.mT.contiguous()  # for the differences to lie in rows
    differences = (coordinates.unsqueeze(-1) - coordinates.unsqueeze(-2)).square_().flatten(-2, -1)
    if again:
        _kept = ((x.clone(), differences), *_kept[: _NUM_KEPT - 1])
    return differences
