"""The same GP in plain torch, without GPyTorch's modules and operators: value by formula, gradient three ways.

For the questions attribution and peers.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch

from gpytorch.kernels.kernel import dist, sq_dist

InvQuadLogdet = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]

ROOT5 = math.sqrt(5)


def correlation(x1: torch.Tensor, x2: torch.Tensor, lengthscale: torch.Tensor, kernel: str) -> torch.Tensor:
    """Return the kernel without its outputscale, with the arithmetic (and the distances) of upstream's kernels."""
    z1, z2 = x1 / lengthscale, x2 / lengthscale
    if kernel == "rbf":
        return sq_dist(z1, z2, x1_eq_x2=x1 is x2).div_(-2).exp_()
    r = dist(z1, z2, x1_eq_x2=x1 is x2)
    return (5 / 3 * r**2 + ROOT5 * r + 1) * torch.exp(-ROOT5 * r)


def by_autograd(covariance: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the inverse quadratic form and the log determinant; autograd goes back through Cholesky."""
    factor = torch.linalg.cholesky(covariance)
    half = torch.linalg.solve_triangular(factor, residual, upper=False)
    return half.square().sum(), 2 * factor.diagonal().log().sum()


class Problem(NamedTuple):
    """A GP and its training data."""

    x: torch.Tensor  # training inputs `(n, d)`
    y: torch.Tensor  # training targets `(n,)`
    kernel: str  # "rbf" or "matern"
    mean: torch.Tensor  # constant mean; likewise `outputscale`, `lengthscale` `(1, d)`, `noise`
    outputscale: torch.Tensor
    lengthscale: torch.Tensor
    noise: torch.Tensor


def loss(problem: Problem, inv_quad_logdet: InvQuadLogdet) -> torch.Tensor:
    """Return the negative log marginal likelihood a point.

    :param problem: The GP.
    :param inv_quad_logdet: Says how the two terms, and their gradients, come about.
    """
    x, y, kernel, mean, outputscale, lengthscale, noise = problem
    covariance = outputscale * correlation(x, x, lengthscale, kernel)
    covariance = covariance + noise * torch.eye(len(y), dtype=x.dtype, device=x.device)
    inv_quad, logdet = inv_quad_logdet(covariance, (y - mean).unsqueeze(-1))
    return 0.5 * (inv_quad + logdet + len(y) * math.log(2 * math.pi)) / len(y)


def loss_and_closed_form_gradient(problem: Problem) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Return :func:`loss` and its gradient, both by formula.

    With K = s k + noise I, a = K^-1 (y - mean) and G = (K^-1 - a a^T) / 2n, the gradient with respect to K: noise has
    tr G, the outputscale s has sum(G * k), and lengthscale l_d has, with W = G * s dk/d(r^2) and z = x / l,
    -(4 / l_d) sum_i (z_id^2 sum_j W_ij - z_id (W z)_id).
    """
    x, y, kernel, mean, outputscale, lengthscale, noise = problem
    n = len(y)
    with torch.no_grad():
        z = x / lengthscale
        r2 = sq_dist(z, z, x1_eq_x2=True)
        if kernel == "rbf":
            k = r2.div_(-2).exp_()
            slope = k * -0.5
        else:
            r = r2.clamp_min(1e-30).sqrt_().mul_(ROOT5)
            decay = torch.exp(-r)
            slope = (r + 1).mul_(decay).mul_(-5 / 6)
            k = r2.mul_(5 / 3).add_(r).add_(1).mul_(decay)
        covariance = outputscale * k
        covariance.diagonal().add_(noise)
        factor = torch.linalg.cholesky(covariance)
        residual = (y - mean).unsqueeze(-1)
        alpha = torch.cholesky_solve(residual, factor)
        value = (residual * alpha).sum() + 2 * factor.diagonal().log().sum() + n * math.log(2 * math.pi)
        g = torch.cholesky_inverse(factor).addmm_(alpha, alpha.mT, alpha=-1).div_(2 * n)
        w = slope.mul_(g).mul_(outputscale)
        inner = z.square().mul(w.sum(-1, keepdim=True)) - z * (w @ z)
        gradient = {
            "mean": -alpha.sum() / n,
            "outputscale": k.mul_(g).sum(),
            "lengthscale": -4 / lengthscale * inner.sum(0, keepdim=True),
            "noise": g.diagonal().sum(),
        }
        return value / (2 * n), gradient
