"""The constant mean, expanded in one step."""

from __future__ import annotations

from torch import Tensor

from .. import _upstream, settings

_upstream.extend(__name__)

_upstream_forward = ConstantMean.forward  # noqa: F821 (from the installed module)


@_upstream.replaces(ConstantMean)  # noqa: F821
def forward(self, input: Tensor) -> Tensor:
    """With :class:`gpytorch.settings.use_torch_tensors` on, a constant with no batch shape is expanded in one step."""
    if settings.use_torch_tensors.off() or (constant := self.constant).dim() > 0:
        return _upstream_forward(self, input)
    return constant.expand(input.shape[:-1])
