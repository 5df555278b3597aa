"""The log density of the log normal prior, which every BoTorch model has two of, in one formula."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .. import _upstream, settings

_upstream.extend(__name__)

_LOG_ROOT_2_PI = 0.5 * math.log(2 * math.pi)

_upstream_log_prob = LogNormalPrior.log_prob  # noqa: F821 (from the installed module)


@_upstream.replaces(LogNormalPrior)  # noqa: F821
def log_prob(self, x: Tensor) -> Tensor:
    r"""
    With :class:`gpytorch.settings.use_torch_tensors` on, computes

    .. math::
        -\frac{(\log x - \mu)^2}{2 \sigma^2} - \log \sigma - \frac{1}{2} \log 2 \pi - \log x

    with no transformed distribution in between.
    """
    if settings.use_torch_tensors.off():
        return _upstream_log_prob(self, x)
    x = self.transform(x)
    # torch.vmap lets `_is_all_true` decide, which torch's own validation asks, and not `all`.
    if self._validate_args and (
        self._batch_shape or not isinstance(x, Tensor) or not torch._is_all_true(torch.gt(x, 0))
    ):
        self._validate_sample(x)  # which also looks at the shapes, and says what is wrong
    log_x, base = x.log(), self.base_dist
    # The variance is rounded to the prior's own dtype, often float32 under a model in float64, before it is divided by.
    standard = (log_x - base.loc).square() / (2 * base.scale.square())
    return -standard - base.scale.log() - _LOG_ROOT_2_PI - log_x
