"""Autograd functions of exact GPs on plain tensors."""

from .. import _upstream

_upstream.extend(__name__)

from . import operator_cholesky  # noqa: E402, F401 (for what it replaces)
from .inv_quad_logdet import TensorInvQuadLogdet  # noqa: E402

__all__ += ["TensorInvQuadLogdet"]  # noqa: F821 (from the installed gpytorch.functions)
