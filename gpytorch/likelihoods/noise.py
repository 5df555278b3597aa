"""The noise that a Gaussian likelihood adds to the diagonal, as a raw parameter where there is one.

Losses and strategies ask for it.
"""

from __future__ import annotations

import torch
from linear_operator.operators import ConstantDiagLinearOperator, DiagLinearOperator
from torch import Tensor

from .. import _upstream
from ..constraints.unconstrained import Unconstrained, unconstrained
from ..lookup import child
from .gaussian_likelihood import FixedNoiseGaussianLikelihood, GaussianLikelihood, _GaussianLikelihoodBase
from .hadamard_gaussian_likelihood import HadamardGaussianLikelihood, _check_task_indices
from .likelihood import Likelihood
from .noise_models import Noise, _HomoskedasticNoiseBase

_MARGINALS = {
    _GaussianLikelihoodBase.marginal,
    GaussianLikelihood.marginal,
    FixedNoiseGaussianLikelihood.marginal,
    HadamardGaussianLikelihood.marginal,
}
_upstream.stands_for(
    *_MARGINALS,
    _GaussianLikelihoodBase._shaped_noise_covar,
    HadamardGaussianLikelihood._shaped_noise_covar,
    _HomoskedasticNoiseBase.forward,
    *(
        cls.__call__
        for cls in Likelihood.__mro__
        if "__call__" in vars(cls) and cls.__module__ == Likelihood.__module__
    ),
    Noise.__call__,
)


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
    noise_covar, shaped = child(likelihood, "noise_covar", GaussianLikelihood), cls._shaped_noise_covar
    if (
        type(noise_covar).forward is _HomoskedasticNoiseBase.forward
        and type(noise_covar).__call__ is Noise.__call__
        and "noise" not in kwargs
    ):
        if shaped is _GaussianLikelihoodBase._shaped_noise_covar:
            noise = unconstrained(noise_covar, "noise", _HomoskedasticNoiseBase)
            if noise[0].shape[-1:] == (1,):  # more would be of several tasks
                return noise
        elif shaped is HadamardGaussianLikelihood._shaped_noise_covar:
            noise = _noise_of_tasks(likelihood, shape, params)
            if noise is not None:
                return noise, False, None
    diagonal = diagonal_of(likelihood._shaped_noise_covar(shape, *params, **kwargs))
    return None if diagonal is None else (diagonal, False, None)


def _noise_of_tasks(likelihood: HadamardGaussianLikelihood, shape: torch.Size, params: tuple) -> Tensor | None:
    # What upstream adds up from an operator for each task, or None where there are no such, or no labels
    if likelihood.num_tasks == 1 or len(params) == 0 or len(params[0]) == 0:
        return None
    tasks = params[0] if torch.is_tensor(params[0]) else params[0][0]
    if tasks.size(-1) > 1:
        if likelihood.task_feature_index is None:
            return None
        tasks = tasks[..., likelihood.task_feature_index].unsqueeze(-1)
    tasks = tasks.long()
    _check_task_indices(tasks, shape)
    is_task = torch.arange(likelihood.num_tasks, device=tasks.device).unsqueeze(-1) == tasks.mT
    return (likelihood.noise_covar.noise.unsqueeze(-1) * is_task).sum(-2)


def diagonal_of(covar) -> Tensor | None:
    """Return the diagonal (... x N or ... x 1) of a plain diagonal covariance, None for any other."""
    if type(covar) is ConstantDiagLinearOperator:
        return covar.diag_values
    return covar._diag if type(covar) is DiagLinearOperator else None
