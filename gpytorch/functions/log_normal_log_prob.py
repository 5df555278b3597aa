"""The log densities of log normal priors, summed in one autograd node. The marginal log likelihood adds them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .._transforms import UntransformedFunction, below_autograd, is_transformed, must_be_differentiable
from .kernel_covariance import grad_of_plain

_LOG_ROOT_2_PI = 0.5 * math.log(2 * math.pi)


class SumOfLogNormals(UntransformedFunction):
    r"""
    The sum of the log densities at several tensors, which alone are differentiated in. Call
    :func:`sum_of_log_normals`.
    """

    # With t = log x - mu an element's is L = -t^2 / (2 sigma^2) - log sigma - 1/2 log 2 pi - log x, and
    #   dL/dx = -(t / sigma^2 + 1) / x

    @staticmethod
    @below_autograd
    def forward(ctx, parameters: Sequence[tuple[Tensor, Tensor]], *values: Tensor) -> Tensor:
        """
        :param parameters: Mean and standard deviation of the logarithm, for each of `values`.
        :param values: The positive values.
        """
        ctx.save_for_backward(*values)
        ctx.parameters, ctx.minus_slopes = parameters, []
        res, num_elements = None, 0
        for x, (loc, scale) in zip(values, parameters, strict=True):
            log_x, inverse = x.log(), x.reciprocal()
            t = log_x - loc
            standard = t / scale.square()
            ctx.minus_slopes.append(torch.addcmul(inverse, standard, inverse))
            minus = torch.addcmul(log_x + scale.log(), t, standard, value=0.5)
            res = minus.sum() if res is None else res + minus.sum()
            num_elements += minus.numel()
        return torch.rsub(res, -num_elements * _LOG_ROOT_2_PI)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        values, needed = ctx.saved_tensors, ctx.needs_input_grad[1:]
        if must_be_differentiable(grad):

            def plain(*values: Tensor) -> Tensor:
                return _plain_sum([(x, *pair) for x, pair in zip(values, ctx.parameters, strict=True)])

            return None, *grad_of_plain(plain, values, needed, grad)
        minus = -grad
        slopes = zip(values, ctx.minus_slopes, needed, strict=True)
        return None, *((minus * slope).sum_to_size(x.shape) if need else None for x, slope, need in slopes)


def sum_of_log_normals(terms: Sequence[tuple[Tensor, Tensor, Tensor]]) -> Tensor:
    """
    Computes the sum of the log densities of several tensors' elements.

    :param terms: For each tensor the arguments of :func:`log_normal_log_prob`.
    :return: The sum, a scalar.
    """
    if is_transformed() or any(loc.requires_grad or scale.requires_grad for _, loc, scale in terms):
        return _plain_sum(terms)
    return SumOfLogNormals.apply([(loc, scale) for _, loc, scale in terms], *(x for x, _, _ in terms))


def log_normal_log_prob(x: Tensor, loc: Tensor, scale: Tensor) -> Tensor:
    r"""
    Computes

    .. math::
        -\frac{(\log x - \mu)^2}{2 \sigma^2} - \log \sigma - \frac{1}{2} \log 2 \pi - \log x.

    :param x: The positive value.
    :param loc: :math:`\mu`.
    :param scale: :math:`\sigma`. Its square is rounded to its own dtype, which a prior often has in float32 under a
        model in float64.
    :return: The log density, of the shape to which all three broadcast.
    """
    log_x = x.log()
    return -((log_x - loc).square() / (2 * scale.square())) - scale.log() - _LOG_ROOT_2_PI - log_x


def _plain_sum(terms: Sequence[tuple[Tensor, Tensor, Tensor]]) -> Tensor:
    return sum(log_normal_log_prob(*term).sum() for term in terms)
