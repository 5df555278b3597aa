"""The density of the log normal prior, which every BoTorch model has two of, as one formula in place of a transformed
one."""

from __future__ import annotations

from torch import Tensor

from .. import _upstream, settings
from ..functions.log_normal_log_prob import log_normal_log_prob
from .log_normal import log_normal_arguments

_upstream.extend(__name__)

_upstream_log_prob = LogNormalPrior.log_prob  # noqa: F821 (from the installed module)


@_upstream.replaces(LogNormalPrior)  # noqa: F821
def log_prob(self, x: Tensor) -> Tensor:
    """With :class:`gpytorch.settings.use_torch_tensors` on, no transformed distribution is in between."""
    if settings.use_torch_tensors.off() or not isinstance(x, Tensor):
        return _upstream_log_prob(self, x)
    return log_normal_log_prob(*log_normal_arguments(self, x))
