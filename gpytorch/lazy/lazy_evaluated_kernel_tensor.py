"""Makes the covariance that a kernel has not evaluated yet, in fewer steps than upstream, and such that
`torch.compile` can trace it."""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor

from .. import _upstream, settings

_upstream.extend(__name__)

_upstream_size = LazyEvaluatedKernelTensor._size  # noqa: F821 (from the installed module)
_upstream_evaluate_kernel = LazyEvaluatedKernelTensor.evaluate_kernel  # noqa: F821
_upstream_init = LazyEvaluatedKernelTensor.__init__  # noqa: F821


@_upstream.replaces(LazyEvaluatedKernelTensor)  # noqa: F821
def __init__(self, x1, x2, kernel, last_dim_is_batch=False, **params):
    are_tensors = isinstance(x1, Tensor) and isinstance(x2, Tensor)
    if settings.use_torch_tensors.off() or params or not are_tensors:
        return _upstream_init(self, x1, x2, kernel, last_dim_is_batch, **params)
    # What upstream sets. LinearOperator.__init__ sorts its arguments first, by a key that the compiler does not know.
    self._args = x1, x2
    self._differentiable_kwargs = OrderedDict()
    self._nondifferentiable_kwargs = {"kernel": kernel, "last_dim_is_batch": last_dim_is_batch}
    self.kernel, self.x1, self.x2 = kernel, x1, x2
    self.last_dim_is_batch, self.params = last_dim_is_batch, params
    self._is_grad_enabled = torch.is_grad_enabled()


@_upstream.replaces(LazyEvaluatedKernelTensor)  # noqa: F821
def _size(self):
    # Not from a cache, whose key is a pickle, which the compiler does not know either
    is_traced = settings.use_torch_tensors.on() and torch.compiler.is_compiling()
    return _upstream_size.__wrapped__(self) if is_traced else _upstream_size(self)


@_upstream.replaces(LazyEvaluatedKernelTensor)  # noqa: F821
def evaluate_kernel(self):
    is_traced = settings.use_torch_tensors.on() and torch.compiler.is_compiling()
    return _upstream_evaluate_kernel.__wrapped__(self) if is_traced else _upstream_evaluate_kernel(self)
