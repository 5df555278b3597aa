"""The prediction strategy of kernels without structure."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .. import _upstream, settings
from ..distributions import MultivariateNormal

_upstream.extend(__name__)

_upstream_prediction_strategy = Kernel.prediction_strategy  # noqa: F821 (from the installed module)


@_upstream.replaces(Kernel)  # noqa: F821
def prediction_strategy(
    self, train_inputs: Tensor, train_prior_dist: MultivariateNormal, train_labels: Tensor, likelihood: Any
) -> Any:
    strategy = None
    if settings.use_torch_tensors.on():
        from ..models.dense_prediction_strategy import dense_prediction_strategy  # which imports this module

        strategy = dense_prediction_strategy(train_inputs, train_prior_dist, train_labels, likelihood)
    if strategy is None:
        return _upstream_prediction_strategy(self, train_inputs, train_prior_dist, train_labels, likelihood)
    return strategy
