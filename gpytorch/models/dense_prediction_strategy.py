"""The posterior of an exact GP from one Cholesky factor, kept as a tensor."""

from __future__ import annotations

import copyreg
import functools
import weakref
from typing import Any

import torch
from linear_operator.operators import LinearOperator, ZeroLinearOperator
from torch import Tensor

from .. import _upstream, settings
from .._internals import is_wrapped, memoized_arguments
from .._transforms import is_transformed
from ..closed_form.covariance import ClosedForm, ClosedFormPrior, closed_form
from ..constraints.unconstrained import CONSTRAINTS
from ..dense import factorize, is_dense, note
from ..distributions import MultivariateNormal
from ..functions.shared_rows import SharedRowsOfModel
from ..kernels.kernel import Kernel
from ..likelihoods.noise import marginal_noise
from ..likelihoods.noise_models import FixedGaussianNoise
from ..utils.memoize import add_to_cache, cached, clear_cache_hook, pop_from_cache
from . import joint_prior
from .cholesky_factor import BorderedFactor, CholeskyFactor, border
from .cross_covariance import CrossCovariance
from .exact_prediction_strategies import DefaultPredictionStrategy
from .fantasies import fantasy_covariances, fantasy_noise, reason_for_upstream
from .posterior_covariance import PosteriorCovariance
from .unevaluated import unevaluated

_upstream_prediction_strategy = Kernel.prediction_strategy

# What a saved strategy does without
_CACHES = {"_memoize_cache", "_shared_rows"}

_upstream.stands_for(
    DefaultPredictionStrategy.__init__,
    DefaultPredictionStrategy._mean_cache,
    DefaultPredictionStrategy.exact_prediction,
    DefaultPredictionStrategy.get_fantasy_strategy,
)


class DensePredictionStrategy(DefaultPredictionStrategy):
    r"""
    The prediction strategy of an exact GP whose training covariance is factorized as a dense matrix:

    .. math::
        \mathbf L \mathbf L^\top = \mathbf K_{XX} + \text{diag}(\boldsymbol \sigma^2), \quad
        \boldsymbol \alpha = (\mathbf L \mathbf L^\top)^{-1} (\mathbf y - \boldsymbol \mu), \quad
        \boldsymbol \mu_* + \mathbf K_{*X} \boldsymbol \alpha, \quad
        \mathbf K_{**} - \mathbf K_{*X} (\mathbf L \mathbf L^\top)^{-1} \mathbf K_{X*}.

    Mean and covariance share the factor, and so do later calls. Fantasies border it, and share it too. With
    :class:`gpytorch.settings.use_torch_tensors` off it does what upstream's strategy does.
    """

    # Of fantasies: whether the factor that `fast_pred_var` keeps has no gradient, as set when they were made.
    _is_kept_detached: bool | None = None

    # What the parameters were when the kernel of the prior was evaluated, if it was.
    _evaluated_states: tuple | None = None

    def __init__(
        self,
        train_inputs: list[Tensor],
        train_prior_dist: MultivariateNormal,
        train_labels: Tensor,
        likelihood: Any,
        root: Any = None,
        inv_root: Any = None,
    ):
        # Fantasies that are left to upstream come with the roots of their covariance, which upstream's strategy uses.
        self._has_roots = root is not None or inv_root is not None
        if self._has_roots or train_labels.shape[-1:] != train_prior_dist.event_shape:
            super().__init__(train_inputs, train_prior_dist, train_labels, likelihood, root, inv_root)
            return
        self._train_shape = train_prior_dist.event_shape
        self.train_inputs = train_inputs
        self.train_prior_dist = train_prior_dist
        self.train_labels = train_labels
        self.likelihood = likelihood
        self._last_test_train_covar = None
        self._is_grad_enabled = torch.is_grad_enabled()

    @functools.cached_property
    def lik_train_train_covar(self) -> LinearOperator:
        """The training covariance with its noise, for what upstream does with it."""
        with torch.set_grad_enabled(self._is_grad_enabled):  # as upstream, which makes it with the strategy
            return self.likelihood(self.train_prior_dist, self.train_inputs).lazy_covariance_matrix

    @functools.cached_property
    def _shared_rows(self) -> SharedRowsOfModel:
        return SharedRowsOfModel()

    def train_covar(self) -> ClosedForm | LinearOperator:
        """Return the training covariance with its noise, of the parameters as they are."""
        prior = self.train_prior_dist
        covar = closed_form(prior.lazy_covariance_matrix)
        if covar is not None:
            noise = marginal_noise(self.likelihood, prior.loc.shape, (self.train_inputs,), {})
            if noise is not None:
                return covar.add_noise(noise)
        states = self._states()
        if self._evaluated_states not in (None, states):
            # The prior keeps what its kernel evaluated to; a clone is evaluated anew.
            prior = MultivariateNormal(prior.loc, prior.lazy_covariance_matrix.clone())
        else:
            self._evaluated_states = states
        return self.likelihood(prior, self.train_inputs).lazy_covariance_matrix

    def takes_tensors(self) -> bool:
        """Return whether a prediction made now is made on tensors."""
        return (
            not self._has_roots
            and settings.use_torch_tensors.on()
            and settings.observation_nan_policy.value() == "ignore"
            and solves_by_cholesky(self.num_train)
        )

    def factor(self, detached: bool | None = None) -> CholeskyFactor:
        """Return the Cholesky factor of the training covariance.

        :param detached: Whether it has no gradient (Default: what `detach_test_caches` says).
        """
        if detached is None:
            detached = settings.detach_test_caches.on()
        detached = detached or not torch.is_grad_enabled()
        # As upstream: `fast_pred_var` keeps what was, and without it the parameters count as they are at every call.
        if settings.fast_pred_var.on():
            for of_detached, states in self._kept_factors():
                if of_detached == detached:
                    return self._factor(detached, states)
        return self._factor(detached, self._states())

    def _kept_factors(self) -> list[tuple[bool, tuple]]:
        return memoized_arguments(self, "factor")

    def _states(self) -> tuple:
        # What the parameters are of which a factor is made
        prior = self.train_prior_dist
        kernel = getattr(prior.lazy_covariance_matrix, "kernel", None) if prior.islazy else None
        parameters: list[Tensor] = []
        for module in (self.likelihood, kernel):
            if module is not None:
                _add_parameters(module, parameters)
        is_readable = not is_transformed()
        return tuple([_state(parameter, is_readable) for parameter in parameters])

    @cached(name="factor")
    def _factor(self, detached: bool, states: tuple) -> CholeskyFactor:
        for was_detached, before in self._kept_factors():
            if before != states:
                pop_from_cache(self, "factor", was_detached, before)
        return CholeskyFactor(self._until_backward(factorize(self.train_covar(), detached)))

    @cached(name="mean_cache")
    def _mean_cache(self, nan_policy: str) -> Tensor:
        if not self.takes_tensors():
            return super()._mean_cache(nan_policy)
        residual = (self.train_labels - self.train_prior_dist.loc).unsqueeze(-1)
        alpha = self.factor().solve(residual).squeeze(-1)
        if settings.detach_test_caches.on():
            alpha = alpha.detach()
        return self._until_backward(alpha)

    def get_fantasy_strategy(
        self,
        inputs: list[Tensor],
        targets: Tensor,
        full_inputs: list[Tensor],
        full_targets: Tensor,
        full_output: MultivariateNormal,
        **kwargs: Any,
    ) -> DefaultPredictionStrategy:
        """See upstream's. The Cholesky factor is bordered by the rows of the fantasies, which alone are factorized."""
        upstreams = functools.partial(
            super().get_fantasy_strategy, inputs, targets, full_inputs, full_targets, full_output, **kwargs
        )
        if not self.takes_tensors():
            return upstreams()
        reason = reason_for_upstream(self.train_prior_dist, full_inputs, full_targets, full_output)
        if reason is None:
            likelihood = self.likelihood.get_fantasy_likelihood(**kwargs)
            noise = fantasy_noise(likelihood, inputs, full_inputs, full_output.loc.shape, kwargs)
            if noise is None:
                reason = "the noise of the fantasies is not a diagonal that stays with them"
        if not note(reason is None, reason or "the fantasies border a factor that is kept"):
            return upstreams()
        covars = fantasy_covariances(full_output.lazy_covariance_matrix, self.num_train, noise)
        # Many observations at the same inputs share their covariance.
        _, loc = torch.broadcast_tensors(full_targets, full_output.loc)
        prior = MultivariateNormal(loc, full_output.lazy_covariance_matrix)
        strategy = DensePredictionStrategy(full_inputs, prior, full_targets, likelihood)
        strategy._keep(border(self.factor(detached=False), *covars))
        return strategy

    def _keep(self, factor: BorderedFactor) -> None:
        states, is_grad_enabled = self._states(), torch.is_grad_enabled()
        self._is_kept_detached = settings.detach_test_caches.on() or not is_grad_enabled
        add_to_cache(self, "factor", factor.detach(), True, states)
        if is_grad_enabled:
            for block in factor.blocks[-2:]:
                self._until_backward(block)
            add_to_cache(self, "factor", factor, False, states)

    def __reduce__(self) -> tuple:
        # What is saved loads in any GPyTorch: as upstream's strategy, with nothing cached.
        self.lik_train_train_covar  # noqa: B018 (computed, for upstream's strategy to have it)
        state = {name: value for name, value in self.__dict__.items() if name not in _CACHES}
        return copyreg._reconstructor, (DefaultPredictionStrategy, object, None), state

    def _until_backward(self, cache: Tensor) -> Tensor:
        if cache.grad_fn is not None:
            # The graph holds the hook, and this strategy the graph: weakly, or the collector could free none of them.
            cache.grad_fn.register_hook(functools.partial(_forget, weakref.ref(self)))
        return cache

    def exact_prediction(
        self,
        test_mean: Tensor,
        test_test_covar: Tensor | LinearOperator | ClosedFormPrior,
        test_train_covar: Tensor | LinearOperator | ClosedForm | None = None,
    ) -> tuple[Tensor, LinearOperator]:
        """See upstream's. The covariances may be given before they are evaluated. Before GPyTorch 1.15.2, mean and
        covariance are those of training and test points together."""
        if test_train_covar is None:
            if not self.takes_tensors():
                return super().exact_prediction(test_mean, test_test_covar)
            parts = joint_prior.parts(test_mean, test_test_covar, self.num_train)
            test_mean, test_test_covar, test_train_covar = parts
        # A closed form is what the model gives where it has found that tensors are to be taken.
        if not isinstance(test_train_covar, ClosedForm) and not self.takes_tensors():
            evaluated = (covar.evaluate_kernel() for covar in (test_test_covar, test_train_covar))
            return super().exact_prediction(test_mean, *evaluated)
        prior, cross = unevaluated(test_test_covar, test_train_covar)
        is_covariance_read = settings.skip_posterior_variances.off()
        cross = CrossCovariance(cross, self._shared_rows, is_covariance_read)
        mean = test_mean + cross.times(self.mean_cache)
        if not is_covariance_read:
            return mean, ZeroLinearOperator(*mean.shape, mean.size(-1))
        shape = torch.Size((*mean.shape, mean.size(-1)))
        kept = self._is_kept_detached if settings.fast_pred_var.on() else None
        return mean, PosteriorCovariance(prior, cross, self.factor(kept), shape)


def _forget(strategy: weakref.ref[DensePredictionStrategy], *_: Any) -> None:
    if (alive := strategy()) is not None:
        clear_cache_hook(alive)


def _add_parameters(module: torch.nn.Module, parameters: list[Tensor]) -> None:
    # Module.parameters() makes up names, at the cost of a small matrix product.
    parameters += [parameter for parameter in module._parameters.values() if parameter is not None]
    if isinstance(module, FixedGaussianNoise):
        parameters.append(module.noise)
    for child in module._modules.values():
        if child is not None and type(child) not in CONSTRAINTS:
            _add_parameters(child, parameters)


def _state(parameter: Tensor, is_readable: bool) -> int | bytes | str:
    # What is set through `.data`, as `module.lengthscale = 0.5` does, counts no version: the values tell. Only where
    # they cannot be read, or not without waiting for a device, does the version.
    if is_readable and parameter.is_cpu and not is_wrapped(parameter):
        return parameter.numpy(force=True).tobytes()
    # Tensors of `torch.inference_mode` count no versions either.
    return str(parameter.tolist()) if parameter.is_inference() else parameter._version


@_upstream.replaces(Kernel)
def prediction_strategy(
    self, train_inputs: list[Tensor], train_prior_dist: MultivariateNormal, train_labels: Tensor, likelihood: Any
) -> DefaultPredictionStrategy:
    strategy = None
    if settings.use_torch_tensors.on():
        strategy = dense_prediction_strategy(train_inputs, train_prior_dist, train_labels, likelihood)
    if strategy is None:
        return _upstream_prediction_strategy(self, train_inputs, train_prior_dist, train_labels, likelihood)
    return strategy


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
    return strategy if is_dense(strategy.train_covar()) else None


def solves_by_cholesky(n: int) -> bool:
    """Return whether upstream factorizes a covariance matrix of `n` rows to solve against it."""
    return settings.fast_computations.solves.off() or n <= settings.max_cholesky_size.value()
