"""Kernels as expressions that are evaluated and differentiated in closed form."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from ..functions.kernel_covariance import (
    MATERN,
    RATIONAL_QUADRATIC,
    RBF,
    Expression,
    Product,
    Scaled,
    Stationary,
    Sum,
)
from .kernel import AdditiveKernel, Kernel, ProductKernel
from .matern_kernel import MaternKernel
from .periodic_kernel import PeriodicKernel
from .rbf_kernel import RBFKernel
from .rq_kernel import RQKernel
from .scale_kernel import ScaleKernel


def kernel_expression(kernel: Kernel, x1: Tensor, x2: Tensor, values: list[Tensor]) -> Expression | None:
    """Write the covariance of a kernel as an expression, if the kernel is made of such as have one.

    A kernel is known by its `forward`: a subclass that overrides it has no closed form here, one that does not has.

    :param kernel: The kernel.
    :param x1: The inputs of the rows, with the kernel's active dimensions selected (... x N x D).
    :param x2: The inputs of the columns (... x M x D).
    :param values: Where the tensors that the expression is made of are appended.
    :return: The expression, or None; then `values` may have grown.
    """
    write = _WRITERS.get(getattr(kernel.forward, "__func__", None))
    if write is None or type(kernel).covar_dist is not Kernel.covar_dist:
        return None
    if kernel.ard_num_dims is not None and kernel.ard_num_dims != x1.size(-1):
        return None  # upstream says what is wrong
    return write(kernel, x1, x2, values)


def _append(values: list[Tensor], *tensors: Tensor) -> list[int]:
    values.extend(tensors)
    return list(range(len(values) - len(tensors), len(values)))


def _warp(warp: Callable[[Tensor], Tensor], x1: Tensor, x2: Tensor, values: list[Tensor]) -> list[int]:
    return _append(values, warp(x1)) * 2 if x1 is x2 else _append(values, warp(x1), warp(x2))


def _scale_inputs(kernel: Kernel, x1: Tensor, x2: Tensor, values: list[Tensor]) -> list[int]:
    # Distances do not depend on where the origin lies, nor do their gradients; their rounding does.
    center = (x1 if x1.dim() < x2.dim() else x2).detach().mean(-2, keepdim=True)
    lengthscale = kernel.lengthscale
    return _warp(lambda x: (x - center) / lengthscale, x1, x2, values)


def _rbf(kernel: RBFKernel, x1: Tensor, x2: Tensor, values: list[Tensor]) -> Expression:
    z1, z2 = _scale_inputs(kernel, x1, x2, values)
    return lambda values: Stationary(values, RBF, z1, z2)


def _matern(kernel: MaternKernel, x1: Tensor, x2: Tensor, values: list[Tensor]) -> Expression:
    z1, z2 = _scale_inputs(kernel, x1, x2, values)
    profile = MATERN[kernel.nu]
    return lambda values: Stationary(values, profile, z1, z2)


def _rational_quadratic(kernel: RQKernel, x1: Tensor, x2: Tensor, values: list[Tensor]) -> Expression:
    z1, z2 = _scale_inputs(kernel, x1, x2, values)
    (alpha,) = _append(values, kernel.alpha.unsqueeze(-1))
    return lambda values: Stationary(values, RATIONAL_QUADRATIC, z1, z2, alpha)


def _periodic(kernel: PeriodicKernel, x1: Tensor, x2: Tensor, values: list[Tensor]) -> Expression:
    # 4 sin^2(pi (x - x') / p) is the squared distance of the points that x and x' have at the angles 2 pi x / p on the
    # unit circle: the periodic kernel is the RBF kernel of these points, over the root of its lengthscale.
    frequency = 2 * math.pi / kernel.period_length
    radius = kernel.lengthscale.rsqrt()

    def warp(x: Tensor) -> Tensor:
        angle = x * frequency
        return torch.cat([angle.cos() * radius, angle.sin() * radius], dim=-1)

    z1, z2 = _warp(warp, x1, x2, values)
    return lambda values: Stationary(values, RBF, z1, z2)


def _scale(kernel: ScaleKernel, x1: Tensor, x2: Tensor, values: list[Tensor]) -> Expression | None:
    child = kernel_expression(kernel.base_kernel, x1, x2, values)
    if child is None:
        return None
    outputscale = kernel.outputscale
    (scale,) = _append(values, outputscale.view(*outputscale.shape, 1, 1))
    return lambda values: Scaled(values, child, scale)


def _composite(
    node: type, kernel: AdditiveKernel | ProductKernel, x1: Tensor, x2: Tensor, values: list[Tensor]
) -> Expression | None:
    children = []
    for part in kernel.kernels:
        if type(part).__call__ is not Kernel.__call__:
            return None
        x1_, x2_ = x1, x2
        if part.active_dims is not None:
            x1_ = x1.index_select(-1, part.active_dims)
            x2_ = x1_ if x2 is x1 else x2.index_select(-1, part.active_dims)
        child = kernel_expression(part, x1_, x2_, values)
        if child is None:
            return None
        children.append(child)
    return lambda values: node(values, *children)


_WRITERS: dict[Callable, Callable] = {
    RBFKernel.forward: _rbf,
    MaternKernel.forward: _matern,
    RQKernel.forward: _rational_quadratic,
    PeriodicKernel.forward: _periodic,
    ScaleKernel.forward: _scale,
    AdditiveKernel.forward: partial(_composite, Sum),
    ProductKernel.forward: partial(_composite, Product),
}
