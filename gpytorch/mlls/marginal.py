"""The covariance of the observations, with their noise, that the exact losses begin with."""

from __future__ import annotations

from .. import settings
from ..closed_form.covariance import ClosedForm
from ..dense import note, uses_cholesky, written
from ..distributions import MultivariateNormal
from ..likelihoods.likelihood import Likelihood
from ..likelihoods.noise import marginal_noise


def closed_form_marginal(
    likelihood: Likelihood, function_dist: MultivariateNormal, params: tuple, kwargs: dict
) -> ClosedForm | None:
    """Return the covariance of the observations, where it can be had without an operator.

    :param likelihood: The likelihood.
    :param function_dist: The prior at the training inputs.
    :param params: What the likelihood is called with after the distribution.
    :param kwargs: The same, by keyword.
    """
    if (
        not isinstance(function_dist, MultivariateNormal)
        or type(function_dist).log_prob is not MultivariateNormal.log_prob
        or function_dist._validate_args
        or settings.observation_nan_policy.value() != "ignore"
        or not function_dist.islazy
        or not uses_cholesky(function_dist.loc.size(-1))
    ):
        return None
    noise = marginal_noise(likelihood, function_dist.loc.shape, params, kwargs)
    form = None if noise is None else written(function_dist._covar, function_dist.batch_shape)
    if not isinstance(form, ClosedForm):
        return None
    form.add_noise(noise)
    if form.batch_shape != function_dist.batch_shape:
        return None
    note(True, form.reason)
    return form
