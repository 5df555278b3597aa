"""The posterior of an exact GP from one Cholesky factor, kept as a tensor."""

from __future__ import annotations

import copyreg
import functools
from typing import Any

import torch
from linear_operator.operators import LinearOperator, ZeroLinearOperator
from torch import Tensor

from .. import settings
from ..dense import factorize, is_dense, note, unevaluated
from ..distributions import MultivariateNormal
from ..functions.inv_quad_logdet import as_columns
from ..utils.memoize import cached, clear_cache_hook
from .exact_prediction_strategies import DefaultPredictionStrategy
from .posterior_covariance import PosteriorCovariance, row_blocks_of_tests


class DensePredictionStrategy(DefaultPredictionStrategy):
    r"""
    The prediction strategy of an exact GP whose training covariance is factorized as a dense matrix:

    .. math::
        \mathbf L \mathbf L^\top = \mathbf K_{XX} + \text{diag}(\boldsymbol \sigma^2), \quad
        \boldsymbol \alpha = (\mathbf L \mathbf L^\top)^{-1} (\mathbf y - \boldsymbol \mu), \quad
        \boldsymbol \mu_* + \mathbf K_{*X} \boldsymbol \alpha, \quad
        \mathbf K_{**} - \mathbf K_{*X} (\mathbf L \mathbf L^\top)^{-1} \mathbf K_{X*}.

    Mean and covariance share the factor, and so do later calls. With
    :class:`gpytorch.settings.use_torch_tensors` off it does what upstream's strategy does.
    """

    def takes_tensors(self) -> bool:
        """Return whether a prediction made now is made on tensors."""
        return (
            settings.use_torch_tensors.on()
            and settings.observation_nan_policy.value() == "ignore"
            and solves_by_cholesky(self.num_train)
        )

    def factor(self) -> Tensor:
        """Return the Cholesky factor of the training covariance (... x N x N)."""
        # What the noise was when the factor was made: upstream adds it anew at every call.
        versions = tuple(parameter._version for parameter in self.likelihood.parameters())
        return self._factor(settings.detach_test_caches.on() or not torch.is_grad_enabled(), versions)

    @cached(name="factor")
    def _factor(self, detached: bool, versions: tuple[int, ...]) -> Tensor:
        mvn = self.likelihood(self.train_prior_dist, self.train_inputs)
        return self._until_backward(factorize(mvn.lazy_covariance_matrix, detached))

    @cached(name="mean_cache")
    def _mean_cache(self, nan_policy: str) -> Tensor:
        if not self.takes_tensors():
            return super()._mean_cache(nan_policy)
        residual = (self.train_labels - self.train_prior_dist.loc).unsqueeze(-1)
        columns, restore = as_columns(self.factor().shape[:-2], residual)
        alpha = restore(torch.cholesky_solve(columns, self.factor())).squeeze(-1)
        if settings.detach_test_caches.on():
            alpha = alpha.detach()
        return self._until_backward(alpha)

    def __reduce__(self) -> tuple:
        # What is saved loads in any GPyTorch: as upstream's strategy, with nothing cached.
        state = {name: value for name, value in self.__dict__.items() if name != "_memoize_cache"}
        return copyreg.__newobj__, (DefaultPredictionStrategy,), state

    def _until_backward(self, cache: Tensor) -> Tensor:
        if cache.grad_fn is not None:
            cache.grad_fn.register_hook(functools.partial(clear_cache_hook, self))
        return cache

    def exact_prediction(
        self,
        test_mean: Tensor,
        test_test_covar: Tensor | LinearOperator,
        test_train_covar: Tensor | LinearOperator,
    ) -> tuple[Tensor, LinearOperator]:
        """See upstream's. The covariances may be given before they are evaluated."""
        if not self.takes_tensors():
            evaluated = (covar.evaluate_kernel() for covar in (test_test_covar, test_train_covar))
            return super().exact_prediction(test_mean, *evaluated)
        blocks = row_blocks_of_tests(test_train_covar.shape, self.num_train)
        cross = unevaluated(test_train_covar).to_dense
        if len(blocks) == 1:
            cross = functools.partial(_rows, cross())
        alpha = self.mean_cache.unsqueeze(-1)
        explained = [(cross(rows) @ alpha).squeeze(-1) for rows in blocks]
        mean = test_mean + (explained[0] if len(explained) == 1 else torch.cat(explained, dim=-1))
        if settings.skip_posterior_variances.on():
            return mean, ZeroLinearOperator(*test_test_covar.size())
        factor = self.factor()
        shape = torch.Size((*mean.shape[:-1], *test_test_covar.shape[-2:]))
        return mean, PosteriorCovariance(unevaluated(test_test_covar), cross, factor, shape)


def _rows(matrix: Tensor, rows: slice | None) -> Tensor:
    return matrix if rows is None else matrix[..., rows, :]


def dense_prediction_strategy(
    train_inputs: list[Tensor], train_prior_dist: MultivariateNormal, train_labels: Tensor, likelihood: Any
) -> DensePredictionStrategy | None:
    """Return the prediction strategy on tensors, where upstream would factorize a dense training covariance.

    :param train_inputs: The training inputs.
    :param train_prior_dist: The prior at the training inputs.
    :param train_labels: The training targets.
    :param likelihood: The likelihood.
    """
    n = train_prior_dist.loc.size(-1)
    reason = None
    if type(train_prior_dist) is not MultivariateNormal:
        reason = f"the prior is a {type(train_prior_dist).__name__}"
    elif not solves_by_cholesky(n):
        reason = f"{n} rows are more than max_cholesky_size"
    elif settings.observation_nan_policy.value() != "ignore":
        reason = f"observation_nan_policy is {settings.observation_nan_policy.value()!r}"
    if reason is not None:
        note(False, reason)
        return None
    strategy = DensePredictionStrategy(train_inputs, train_prior_dist, train_labels, likelihood)
    return strategy if is_dense(strategy.lik_train_train_covar) else None


def solves_by_cholesky(n: int) -> bool:
    """Return whether upstream factorizes a covariance matrix of `n` rows to solve against it."""
    return settings.fast_computations.solves.off() or n <= settings.max_cholesky_size.value()
