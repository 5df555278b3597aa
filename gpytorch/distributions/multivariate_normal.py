"""The log probability of a multivariate normal on plain tensors."""

from __future__ import annotations

import torch
from linear_operator import LinearOperator
from torch import Tensor

import gpytorch  # for what is not there yet while this is imported: kernels, and `dense`

from .. import _internals, _upstream, settings
from ..constraints import unconstrained

_upstream.extend(__name__)

_upstream_init = MultivariateNormal.__init__  # noqa: F821 (from the installed module)
_upstream_log_prob = MultivariateNormal.log_prob  # noqa: F821


@_upstream.replaces(MultivariateNormal)  # noqa: F821
def __init__(self, mean: Tensor, covariance_matrix: Tensor | LinearOperator, validate_args: bool = False):
    batch_shape = None
    if settings.use_torch_tensors.on() and not validate_args:
        batch_shape = _unbroadcast_batch_shape(mean, covariance_matrix)
    if batch_shape is None:
        return _upstream_init(self, mean, covariance_matrix, validate_args)
    # What upstream sets, with no operator asked for its shape.
    self._islazy = True
    self.loc = mean
    self._covar = covariance_matrix
    setattr(self, _internals.SCALE_TRIL, None)
    self._validate_args = False
    self._batch_shape = batch_shape
    self._event_shape = mean.shape[-1:]


@_upstream.replaces(MultivariateNormal)  # noqa: F821
def log_prob(self, value: Tensor) -> Tensor:
    r"""
    With :class:`gpytorch.settings.use_torch_tensors` on, and a covariance matrix that would be factorized as a dense
    matrix, computes

    .. math::
        -\frac{1}{2} \left( \mathbf r^\top \mathbf K^{-1} \mathbf r + \log \vert \mathbf K \vert + N \log 2 \pi \right),
        \quad \mathbf r = \mathbf y - \boldsymbol \mu

    by :class:`gpytorch.functions.TensorInvQuadLogdet`.

    :param value: :math:`\mathbf y` (... x N).
    :return: The log probability, of the shape to which the batch shapes of value and distribution broadcast.
    """
    if settings.use_torch_tensors.off():
        return _upstream_log_prob(self, value)
    # With log_prob off, upstream takes the distribution's own factor, if it has one by now.
    factor = getattr(self, _internals.SCALE_TRIL)
    if settings.fast_computations.log_prob.off() and factor is not None:
        gpytorch.dense.note(False, "the distribution has a factor already")
        return _upstream_log_prob(self, value)
    log_prob_of_residual = gpytorch.dense.decide(self.lazy_covariance_matrix)
    if log_prob_of_residual is None:
        return _upstream_log_prob(self, value)
    if self._validate_args:
        self._validate_sample(value)
    return log_prob_of_residual(value - self.loc)


def _unbroadcast_batch_shape(mean: Tensor, covar: LinearOperator | Tensor) -> torch.Size | None:
    """Return the batch shape of mean and covariance, where nothing in either needs to be broadcast.

    :param mean: The mean (... x N).
    :param covar: The covariance matrix (... x N x N).
    :return: The batch shape, or None where it takes more than a look to know.
    """
    batch_shape = mean.shape[:-1]
    if not isinstance(covar, LinearOperator):
        return None
    if type(covar) is not gpytorch.lazy.LazyEvaluatedKernelTensor:
        return batch_shape if covar.shape[:-2] == batch_shape else None
    if covar.x1 is not covar.x2 or covar.last_dim_is_batch or covar.x1.shape[:-2] != batch_shape:
        return None
    # One kernel for each of the batch, or one for all
    is_known = _has_batch_shape(covar.kernel, batch_shape) or _has_batch_shape(covar.kernel, torch.Size())
    return batch_shape if is_known else None


def _has_batch_shape(kernel: torch.nn.Module, batch_shape: torch.Size) -> bool:
    if isinstance(kernel, gpytorch.kernels.Kernel) and (
        kernel._batch_shape != batch_shape or type(kernel).batch_shape is not gpytorch.kernels.Kernel.batch_shape
    ):
        return False
    for child in kernel._modules.values():
        if (
            child is not None
            and type(child) not in unconstrained.CONSTRAINTS
            and not _has_batch_shape(child, batch_shape)
        ):
            return False
    return True
