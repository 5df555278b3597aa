"""How stationary kernels fall off with distance."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

TINY = 1e-15  # the least distance, as in the installed gpytorch.kernels.kernel.dist: it keeps the root differentiable

# A profile gives, for a block of squared distances r2 (or of distances r) that it may overwrite:
#   k                 the kernel,
#   slope, c          dk / d(r2) = c * slope,
#   shape_slope       dk / d(shape parameter), where there is one.
# The formulas stand in the table of the module's documentation: README, "The mathematics".


def _rbf(r2: Tensor, shape: None) -> tuple[Tensor, Tensor, float]:
    k = r2.mul_(-0.5).exp_()
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


def _rational_quadratic(r2: Tensor, alpha: Tensor) -> tuple[Tensor, Tensor, float]:
    base = r2.div_(2 * alpha).add_(1)
    slope = base.pow(-alpha - 1)
    return slope * base, slope, -0.5


def _rational_quadratic_shape_slope(r2: Tensor, alpha: Tensor) -> Tensor:
    # log k = -alpha log(base) with base = 1 + r2 / (2 alpha), so d log k / d alpha = (base - 1) / base - log(base)
    base = r2.div_(2 * alpha).add_(1)
    return base.pow(-alpha).mul_((base - 1).div_(base).sub_(base.log()))


# The same kernels in differentiable operations, for second derivatives and for transformed code.
def _plain_matern52(r: Tensor, shape: None) -> Tensor:
    u = r * math.sqrt(5)
    return (1 + u + u.square() / 3) * torch.exp(-u)


def _plain_matern32(r: Tensor, shape: None) -> Tensor:
    u = r * math.sqrt(3)
    return (1 + u) * torch.exp(-u)


class Profile:
    """How a stationary kernel falls off with distance.

    :param block: The kernel and its slope on a block.
    :param plain: The kernel in differentiable operations.
    :param of_distance: Whether both take the distance rather than its square.
    :param shape_slope: The derivative in the shape parameter on a block of squared distances.
    :param is_kinked: Whether the slope in the squared distance grows without bound towards zero.
    """

    def __init__(
        self,
        block: Callable,
        plain: Callable,
        of_distance: bool = False,
        shape_slope: Callable | None = None,
        is_kinked: bool = False,
    ):
        self.is_kinked = is_kinked
        self.block = block
        self.plain = plain
        self.of_distance = of_distance
        self.shape_slope = shape_slope


RBF = Profile(_rbf, lambda r2, shape: torch.exp(-0.5 * r2))
MATERN = {
    0.5: Profile(_matern12, lambda r, shape: torch.exp(-r), of_distance=True, is_kinked=True),
    1.5: Profile(_matern32, _plain_matern32, of_distance=True),
    2.5: Profile(_matern52, _plain_matern52, of_distance=True),
}
RATIONAL_QUADRATIC = Profile(
    _rational_quadratic,
    lambda r2, alpha: (1 + r2 / (2 * alpha)).pow(-alpha),
    shape_slope=_rational_quadratic_shape_slope,
)
