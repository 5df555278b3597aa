"""The covariances of new observations with the training data and with each other, or the reason why upstream computes
them."""

from __future__ import annotations

from typing import Any

import torch
from linear_operator.operators import LinearOperator
from torch import Tensor

from .. import settings
from .._transforms import is_transformed
from ..closed_form.parameters import Parameter
from ..distributions import MultivariateNormal
from ..functions.kernel_log_prob import add_diagonal
from ..kernels.kernel import Kernel
from ..lazy import LazyEvaluatedKernelTensor
from ..likelihoods.likelihood import Likelihood
from ..likelihoods.noise import marginal_noise
from .unevaluated import unevaluated


def reason_for_upstream(
    train_prior_dist: MultivariateNormal, full_inputs: list[Tensor], full_targets: Tensor, full_output: Any
) -> str | None:
    """Return why fantasies cannot border a factor, None where they can.

    :param train_prior_dist: The prior at the training inputs.
    :param full_inputs: The training inputs with those of the fantasies behind them (... x N+M x D).
    :param full_targets: The training targets with the fantasies (... x N+M).
    :param full_output: The prior at all these inputs.
    """
    n = full_targets.size(-1)
    if type(full_output) is not MultivariateNormal:
        return f"the prior is a {type(full_output).__name__}"
    if full_output.loc.shape != (*full_inputs[0].shape[:-2], n):
        return "the prior is not of the inputs' batch shape"
    # What upstream goes by where it updates the root of the training covariance
    if n > settings.max_cholesky_size.value() and settings.fast_computations.covar_root_decomposition.on():
        return f"{n} rows are more than max_cholesky_size"
    if not _has_block(full_output.lazy_covariance_matrix, train_prior_dist.lazy_covariance_matrix):
        return "the covariance of the training data depends on the fantasies' inputs"
    return None


def _has_block(full_covar: LinearOperator, covar: LinearOperator) -> bool:
    # Whether a covariance is the first block of another. Where no value can be read, it is taken to be.
    if is_transformed():
        return True
    return (
        type(full_covar) is type(covar) is LazyEvaluatedKernelTensor
        and _is_same(full_covar.kernel, covar.kernel)
        and torch.allclose(full_covar.x1[..., : covar.x1.size(-2), :], covar.x1)
    )


def _is_same(kernel: Kernel, other: Kernel) -> bool:
    # A model of fantasies has a copy of the kernel.
    pairs = zip(kernel.parameters(), other.parameters(), strict=False)
    return kernel is other or (type(kernel) is type(other) and all(torch.equal(a, b) for a, b in pairs))


def fantasy_noise(
    likelihood: Likelihood, inputs: list[Tensor], full_inputs: list[Tensor], full_shape: torch.Size, kwargs: dict
) -> Tensor | None:
    """Return the noise of fantasies (... x M or ... x 1), or None if it is no plain diagonal, or not theirs for good.

    :param likelihood: The likelihood that goes with the fantasies.
    :param inputs: Their inputs (... x M x D).
    :param full_inputs: The training inputs with those of the fantasies behind them (... x N+M x D).
    :param full_shape: The shape of the prior's mean at all these (... x N+M).
    :param kwargs: What the fantasies come with: their noise, or nothing.
    """
    num_fantasies = inputs[0].size(-2)
    noise = _noise(likelihood, torch.Size((*full_shape[:-1], num_fantasies)), inputs, kwargs)
    if noise is not None and kwargs:
        kept = _noise(likelihood, full_shape, full_inputs, {})
        if kept is None or not torch.equal(kept[..., -num_fantasies:], noise):
            return None
    return noise


def _noise(likelihood: Likelihood, shape: torch.Size, inputs: list[Tensor], kwargs: dict) -> Tensor | None:
    noise = marginal_noise(likelihood, shape, (inputs,), kwargs)
    if noise is None:
        return None
    tensor, is_raw, lower_bound = noise
    return Parameter(0, is_raw, lower_bound).of([tensor])


def fantasy_covariances(full_covar: LinearOperator, num_train: int, noise: Tensor) -> tuple[Tensor, Tensor]:
    """Return the covariance of fantasies with the training data (... x M x N) and their own, noisy one (... x M x M).

    :param full_covar: The prior covariance of training data and fantasies (... x N+M x N+M).
    :param num_train: N.
    :param noise: The noise of the fantasies (... x M or ... x 1).
    """
    train, fantasies = slice(None, num_train), slice(num_train, None)
    if type(full_covar) is LazyEvaluatedKernelTensor and not (full_covar.params or full_covar.last_dim_is_batch):
        x, kernel = full_covar.x1[..., fantasies, :], full_covar.kernel
        covar = LazyEvaluatedKernelTensor(x, x, kernel=kernel)
        cross = LazyEvaluatedKernelTensor(x, full_covar.x2[..., train, :], kernel=kernel)
    else:
        covar, cross = full_covar[..., fantasies, fantasies], full_covar[..., fantasies, train]
    covar, cross = unevaluated(covar, cross)
    return cross.to_dense(), add_diagonal(covar.to_dense(), noise)
