"""The formulas of the stationary kernels: k as a function of the distance, and its derivative."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

TINY = 1e-15  # the least distance, as in the installed gpytorch.kernels.kernel.dist: it keeps the root differentiable

# A profile gives, for a block of h = unit * r^2 (or of distances r) that it may overwrite:
#   k                 the kernel,
#   slope, c          dk / d(r^2) = c * slope,
#   shape_slope       dk / d(shape parameter), where there is one, from k and its slope.
# The formulas stand in the table of the module's documentation: README, "The mathematics".


# On a CPU 2^x takes half as long as e^x, and a tenth where these underflow, as they do between points that are many
# lengthscales apart.
_RBF_UNIT = -0.5 * math.log2(math.e)


def _rbf(h: Tensor, shape: None) -> tuple[Tensor, Tensor, float]:
    k = h.exp2_()
    return k, k, -0.5


def _matern12(r: Tensor, shape: None) -> tuple[Tensor, Tensor, float]:
    k = torch.neg(r).exp_()
    return k, (k / r).masked_fill_(r <= TINY, 0.0), -0.5


def _matern32(r: Tensor, shape: None) -> tuple[Tensor, Tensor, float]:
    u = r.mul_(math.sqrt(3))
    exp = torch.neg(u).exp_()
    return u.add_(1).mul_(exp), exp, -1.5


def _matern52(r: Tensor, shape: None) -> tuple[Tensor, Tensor, float]:
    u = r.mul_(math.sqrt(5))
    exp = torch.neg(u).exp_()
    slope = torch.addcmul(exp, u, exp)
    return torch.addcmul(slope, u.square_(), exp, value=1 / 3), slope, -5 / 6


def _cosine(r: Tensor, shape: None) -> tuple[Tensor, Tensor, float]:
    u = r.mul_(math.pi)
    slope = torch.sin(u).div_(u)
    return u.cos_(), slope, -0.5 * math.pi**2


def _rational_quadratic(h: Tensor, alpha: Tensor) -> tuple[Tensor, Tensor, float]:
    base = h.div_(-alpha).add_(1)
    slope = base.pow(-alpha - 1)
    return slope * base, slope, -0.5


def _rational_quadratic_shape_slope(k: Tensor, slope: Tensor) -> Tensor:
    # log k = -alpha log(base) with base = k / slope, so d log k / d alpha = (base - 1) / base - log(base). Where powers
    # of the base underflow, it is not to be had any more, and the result is nothing.
    base = k.div(slope).nan_to_num_(1.0)
    return (base - 1).div_(base).sub_(base.log_()).mul_(k)


# The same kernels in differentiable operations, for second derivatives and for transformed code.
def _plain_matern52(r: Tensor, shape: None) -> Tensor:
    u = r * math.sqrt(5)
    return (1 + u + u.square() / 3) * torch.exp(-u)


def _plain_matern32(r: Tensor, shape: None) -> Tensor:
    u = r * math.sqrt(3)
    return (1 + u) * torch.exp(-u)


class Profile:
    """How a stationary kernel falls off with distance.

    :param block: The kernel and its slope on a block of distances, or of their squares times `unit`.
    :param plain: The kernel in differentiable operations, of distances or their squares.
    :param of_distance: Whether both take the distance.
    :param shape_slope: The derivative in the shape parameter on a block, of the kernel and its slope there.
    :param is_kinked: Whether the slope in the squared distance grows without bound towards zero.
    :param unit: What squared distances are multiplied by.
    """

    def __init__(
        self,
        block: Callable,
        plain: Callable,
        of_distance: bool = False,
        shape_slope: Callable | None = None,
        is_kinked: bool = False,
        unit: float = -0.5,
    ):
        self.is_kinked = is_kinked
        self.unit = unit
        self.block = block
        self.plain = plain
        self.of_distance = of_distance
        self.shape_slope = shape_slope


RBF = Profile(_rbf, lambda r2, shape: torch.exp(-0.5 * r2), unit=_RBF_UNIT)
MATERN = {
    0.5: Profile(_matern12, lambda r, shape: torch.exp(-r), of_distance=True, is_kinked=True),
    1.5: Profile(_matern32, _plain_matern32, of_distance=True),
    2.5: Profile(_matern52, _plain_matern52, of_distance=True),
}
COSINE = Profile(_cosine, lambda r, shape: torch.cos(math.pi * r), of_distance=True)
RATIONAL_QUADRATIC = Profile(
    _rational_quadratic,
    lambda r2, alpha: (1 + r2 / (2 * alpha)).pow(-alpha),
    shape_slope=_rational_quadratic_shape_slope,
)
