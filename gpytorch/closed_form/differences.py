"""Squared differences of coordinates, for few points, and centered inputs, for many.

Stationary kernels are made of them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .remembered import remembered

# Up to the first number of differences of coordinates it is less work to take them all than to set up a matrix product
# for the distances; up to the second, to go through those that are remembered. On CUDA, where such a step takes as long
# as its launches, that saves a fifth of them; sums over many more differences would keep too few of the cores busy.
FEW, FEW_AGAIN = 2**13, {"cpu": 2**16, "cuda": 2**18}

# Up to this number of coordinates it is less work to compare points than to center them.
MANY = 2**16


def squared_differences(x: Tensor) -> Tensor:
    r"""
    Return :math:`(x_{id} - x_{jd})^2`.

    :param x: The points (... x N x D).
    :return: The squared differences (... x D x N^2).
    """
    coordinates = x.mT.contiguous()  # for those in one coordinate to lie side by side
    return (coordinates.unsqueeze(-1) - coordinates.unsqueeze(-2)).square_().flatten(-2)


def weighted_sums(weights: Tensor, squared: Tensor) -> Tensor:
    r"""
    Return :math:`\sum_{ij} W_{ij} D_{dij}`.

    :param weights: :math:`\mathbf W` (... x N x N).
    :param squared: The squared differences (... x D x N^2).
    :return: The sums (... x 1 x D).
    """
    # A product takes one long sum, which in single precision loses a digit; sums in pairs need memory for all terms.
    if weights.dtype is torch.float64:
        return torch.matmul(squared, weights.reshape(*weights.shape[:-2], -1, 1)).mT
    return (squared * weights.reshape(*weights.shape[:-2], 1, -1)).sum(-1).unsqueeze(-2)


def centered(x: Tensor) -> tuple[Tensor, Tensor]:
    r"""
    Return the mean of the points, as a constant, and the points less their mean.

    :param x: The points (... x N x D).
    """
    origin = x.detach().mean(-2, keepdim=True)
    return origin, x - origin


def extended(z: Tensor) -> Tensor:
    r"""
    Return :math:`(\mathbf z_i, 1, -\tfrac12 \Vert \mathbf z_i \Vert^2)`.

    :param z: The points (... x N x D).
    :return: The points with two more coordinates (... x N x (D + 2)).
    """
    half = z.square().sum(-1, keepdim=True).mul_(-0.5)
    return torch.cat((z, torch.ones_like(half), half), -1)


remembered_squared_differences = remembered(squared_differences)
remembered_centered = remembered(centered)
remembered_extended = remembered(extended)
