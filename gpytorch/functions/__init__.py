"""Autograd functions of exact GPs on plain tensors."""

from .. import _upstream

_upstream.extend(__name__)

from .inv_quad_logdet import TensorInvQuadLogdet  # noqa: E402

__all__ += ["TensorInvQuadLogdet"]  # noqa: F821 (from the installed gpytorch.functions)
