"""The noise that a Gaussian likelihood adds, as a tensor."""

from __future__ import annotations

import torch
from linear_operator.operators import ConstantDiagLinearOperator, DiagLinearOperator
from torch import Tensor

from ..constraints.unconstrained import Unconstrained, unconstrained
from .gaussian_likelihood import (
    FixedNoiseGaussianLikelihood,
    GaussianLikelihood,
    _GaussianLikelihoodBase,
)
from .likelihood import Likelihood
from .noise_models import Noise, _HomoskedasticNoiseBase

_MARGINALS = {
    likelihood.marginal for likelihood in (_GaussianLikelihoodBase, GaussianLikelihood, FixedNoiseGaussianLikelihood)
}


def marginal_noise(likelihood: Likelihood, shape: torch.Size, params: tuple, kwargs: dict) -> Unconstrained | None:
    """Return what a likelihood's marginal adds to the diagonal of the covariance (... x N or ... x 1).

    :param likelihood: The likelihood.
    :param shape: The mean's shape (... x N).
    :param params: What the likelihood is called with after the distribution.
    :param kwargs: The same, by keyword.
    :return: The noise, or None if the likelihood is of the user's own making or its noise is not a plain diagonal.
    """
    cls = type(likelihood)
    if cls.__call__ is not Likelihood.__call__ or cls.marginal not in _MARGINALS:
        return None
    noise_covar = likelihood.noise_covar
    if (
        cls._shaped_noise_covar is _GaussianLikelihoodBase._shaped_noise_covar
        and type(noise_covar).forward is _HomoskedasticNoiseBase.forward
        and type(noise_covar).__call__ is Noise.__call__
        and "noise" not in kwargs
    ):
        noise = unconstrained(noise_covar, "noise", _HomoskedasticNoiseBase)
        if noise[0].shape[-1:] == (1,):  # more would be of several tasks
            return noise
    diagonal = diagonal_of(likelihood._shaped_noise_covar(shape, *params, **kwargs))
    return None if diagonal is None else (diagonal, False, None)


def diagonal_of(covar) -> Tensor | None:
    """Return the diagonal (... x N or ... x 1) of a plain diagonal covariance, None for any other."""
    if type(covar) is ConstantDiagLinearOperator:
        return covar.diag_values
    return covar._diag if type(covar) is DiagLinearOperator else None
