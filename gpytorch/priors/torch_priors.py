"""The log density of the log normal prior, which every BoTorch model has two of, in one formula."""

from __future__ import annotations

import math

from torch import Tensor

from .. import _upstream, settings

_upstream.extend(__name__)

_upstream_log_prob = LogNormalPrior.log_prob  # noqa: F821 (from the installed module)


@_upstream.replaces(LogNormalPrior)  # noqa: F821
def log_prob(self, x: Tensor) -> Tensor:
    r"""
    With :class:`gpytorch.settings.use_torch_tensors` on, computes

    .. math::
        -\frac{1}{2} \left( \frac{\log x - \mu}{\sigma} \right)^2 - \log x - \log \sigma - \frac{1}{2} \log 2 \pi

    with no transformed distribution in between.
    """
    if settings.use_torch_tensors.off():
        return _upstream_log_prob(self, x)
    x = self.transform(x)
    if self._validate_args:
        self._validate_sample(x)
    log_x, scale = x.log(), self.base_dist.scale
    standard = (log_x - self.base_dist.loc) / scale
    return standard.square().mul(-0.5) - log_x - (scale.log() + 0.5 * math.log(2 * math.pi))
