"""The prior at test points, unevaluated, for the prediction strategy on tensors; and a call that compiles in one
graph."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

import gpytorch  # for what is not there yet while this is imported: kernels, and their closed forms

from .. import _upstream, settings
from .._shapes import broadcast_shapes
from ..distributions import MultivariateNormal
from ..lazy import LazyEvaluatedKernelTensor
from ..means import ConstantMean
from ..module import Module
from . import joint_prior
from .exact_prediction_strategies import DefaultPredictionStrategy

_upstream.extend(__name__)

_upstream_call = ExactGP.__call__  # noqa: F821 (from the installed module)
# Before 1.15.2 the call hands the joint prior on: see `DensePredictionStrategy.exact_prediction`.
_upstream_test_prior = getattr(ExactGP, "_get_test_prior_mean_and_covariances", None)  # noqa: F821


@_upstream.replaces(ExactGP)  # noqa: F821
def __call__(self, *args: Any, **kwargs: Any) -> Any:
    """
    With :class:`gpytorch.settings.use_torch_tensors` on, `torch.compile` traces the call in one graph, which does not
    look at whether the inputs are the training inputs.
    """
    if not torch.compiler.is_compiling() or settings.use_torch_tensors.off():
        return _upstream_call(self, *args, **kwargs)
    with settings.debug(False):
        return _upstream_call(self, *args, **kwargs)


def _get_test_prior_mean_and_covariances(
    self, train_inputs: Iterable[Tensor], test_inputs: Iterable[Tensor], **kwargs: Any
) -> tuple:
    """
    With :class:`gpytorch.settings.use_torch_tensors` on and a training covariance that is factorized as a tensor, the
    covariances are returned before they are evaluated. Where the model has a constant mean and hands its inputs to its
    kernel as they are, the training inputs do not go through the model again.
    """
    strategy = self.prediction_strategy
    takes_tensors = getattr(strategy, "takes_tensors", None)  # one of our own
    if takes_tensors is None or not takes_tensors():
        return _upstream_test_prior(self, train_inputs, test_inputs, **kwargs)
    prior = _test_prior(self, strategy, train_inputs, test_inputs, kwargs)
    return _joint_prior(self, train_inputs, test_inputs, kwargs) if prior is None else prior


if _upstream_test_prior is not None:
    _upstream.replaces(ExactGP)(_get_test_prior_mean_and_covariances)  # noqa: F821


def _test_prior(
    model: ExactGP,  # noqa: F821
    strategy: DefaultPredictionStrategy,
    train_inputs: Iterable[Tensor],
    test_inputs: Iterable[Tensor],
    kwargs: dict,
) -> tuple | None:
    (train_input, *other_inputs), (test_input, *other_tests) = train_inputs, test_inputs
    train_prior_dist, own_input = strategy.train_prior_dist, strategy.train_inputs[0]
    train_covar = train_prior_dist.lazy_covariance_matrix
    # A model of many observations at the same inputs has these inputs as an expanded view.
    if other_inputs or other_tests or not (train_input is own_input or train_input._base is own_input):
        return None
    # Upstream puts them into one tensor, which is an error, or of the wider of two types.
    if test_input.shape[-1] != train_input.shape[-1] or test_input.dtype is not train_input.dtype:
        return None
    # Another mean may be one of all the points that it is given.
    if not (isinstance(train_prior_dist.loc._base, torch.nn.Parameter) and _is_of(train_covar, own_input)):
        return None
    prior = Module.__call__(model, test_input, **kwargs)
    if type(prior) is not MultivariateNormal or not prior.islazy or not _is_of(prior._covar, test_input):
        return None
    test_covar = prior._covar
    if not (_has_constant(model, prior.loc) and _has_same_kernel(model, train_covar.kernel, test_covar.kernel)):
        return None
    columns = train_covar.x2
    if columns is test_covar.x1:
        # A view, so that the matrix is not one of the training inputs with themselves: its rows are to be taken apart
        # from its columns.
        columns = columns.view_as(columns)
    cross_covar = gpytorch.closed_form.covariance.closed_form_of(test_covar.kernel, test_covar.x1, columns)
    if cross_covar is None:
        cross_covar = LazyEvaluatedKernelTensor(test_covar.x1, columns, kernel=test_covar.kernel)
    else:
        test_covar = gpytorch.closed_form.covariance.ClosedFormPrior(cross_covar)
    batch_shape = prior.batch_shape
    if train_prior_dist.batch_shape not in (batch_shape, ()):
        batch_shape = broadcast_shapes(batch_shape, train_prior_dist.batch_shape)
    return prior.loc, test_covar, cross_covar, batch_shape, prior.event_shape, MultivariateNormal


def _has_constant(model: ExactGP, mean: Tensor) -> bool:  # noqa: F821
    # Whether a mean is no function of the points: a view of the constant of one of the model's means
    children = model._modules.values()
    return any(isinstance(each, ConstantMean) and each._parameters["raw_constant"] is mean._base for each in children)


def _has_same_kernel(model: ExactGP, train_kernel: Module, test_kernel: Module) -> bool:  # noqa: F821
    # Whether the choice of the kernel is no function of the points. A model of fantasies has a copy of the kernel.
    if test_kernel is train_kernel:
        return True
    kernels = [each for each in model._modules.values() if isinstance(each, gpytorch.kernels.Kernel)]
    return len(kernels) == 1 and kernels[0] is test_kernel


def _is_of(covar: Any, inputs: Tensor) -> bool:
    # Whether the model hands its inputs to its kernel as they are
    if type(covar) is not LazyEvaluatedKernelTensor or covar.params or covar.last_dim_is_batch:
        return False
    active_dims = covar.kernel.active_dims
    if covar.x1 is not covar.x2:
        return False
    if active_dims is None:
        return covar.x1 is inputs
    return torch.equal(covar.x1, inputs.index_select(-1, active_dims))


def _joint_prior(
    model: ExactGP,  # noqa: F821
    train_inputs: Iterable[Tensor],
    test_inputs: Iterable[Tensor],
    kwargs: dict,
) -> tuple:
    joint_inputs = []
    for train_input, test_input in zip(train_inputs, test_inputs, strict=True):
        batch_shape = broadcast_shapes(train_input.shape[:-2], test_input.shape[:-2])
        parts = (part.expand(*batch_shape, *part.shape[-2:]) for part in (train_input, test_input))
        joint_inputs.append(torch.cat(list(parts), dim=-2))
    joint = Module.__call__(model, *joint_inputs, **kwargs)
    num_train = train_inputs[0].size(-2)
    test_shape = torch.Size((joint.event_shape[0] - num_train,))
    parts = joint_prior.parts(joint.loc, joint.lazy_covariance_matrix, num_train)
    return *parts, joint.batch_shape, test_shape, type(joint)
