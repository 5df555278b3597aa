"""What GPyTorch does with modules at every step.

It sets gradients to None, changes between training and evaluation, and converts dtype and device.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from . import _internals, _upstream, settings
from .constraints import Interval

_upstream.extend(__name__)

_torch_zero_grad = torch.nn.Module.zero_grad
_upstream_train = Module.train  # noqa: F821 (from the installed module)
_upstream_apply = Module._apply  # noqa: F821
_OWN = ("_is_replica", "parameters", "named_parameters", "named_modules", "_named_members")


@_upstream.replaces(Module)  # noqa: F821
def zero_grad(self, set_to_none: bool = True) -> None:
    """
    With :class:`gpytorch.settings.use_torch_tensors` on, the modules are walked through once, without names, at a third
    of the time.
    """
    next_zero_grad = super(Module, self).zero_grad  # noqa: F821
    is_torchs = next_zero_grad.__func__ is _torch_zero_grad  # a class beside GPyTorch's may have its own
    if settings.use_torch_tensors.on() and set_to_none and is_torchs and _has_torchs_parameters(self):
        _forget_gradients(self, set())
    else:
        next_zero_grad(set_to_none)


def _has_torchs_parameters(module: torch.nn.Module) -> bool:
    # Whether nothing is overridden that torch calls to find the parameters. (Of a replica, torch warns.)
    cls, torchs = type(module), torch.nn.Module
    return (
        cls.parameters is torchs.parameters
        and cls.named_parameters is torchs.named_parameters
        and cls.named_modules is torchs.named_modules
        and cls._named_members is torchs._named_members
        and module.__dict__.keys().isdisjoint(_OWN)
    )


def _forget_gradients(module: torch.nn.Module, seen: set[torch.nn.Module]) -> None:
    seen.add(module)
    for parameter in module._parameters.values():
        if parameter is not None:
            parameter.grad = None
    for child in module._modules.values():
        if child is not None and child not in seen:
            _forget_gradients(child, seen)


@_upstream.replaces(Module)  # noqa: F821
def train(self, mode=True):
    """
    With :class:`gpytorch.settings.use_torch_tensors` on, modules that are all in evaluation mode are left in it.
    """
    if mode is False and settings.use_torch_tensors.on() and _evaluates(self):
        return self
    return _upstream_train(self, mode)


def _evaluates(module: torch.nn.Module) -> bool:
    # Whether modules are in evaluation mode, and all that `eval` does is to put them there
    if module.training:
        return False
    for child in module._modules.values():
        if child is not None and not (_has_one_of(child, "train", _TRAINS) and _evaluates(child)):
            return False
    return True


@_upstream.replaces(Module)  # noqa: F821
def _apply(self, fn, recurse=True):
    """
    With :class:`gpytorch.settings.use_torch_tensors` on, modules whose tensors :meth:`~torch.nn.Module.to` all leaves
    what they are, since they have the device and dtype already, are left alone: an acquisition function of BoTorch's
    asks at every evaluation.
    """
    # Another function might write to the tensors, or draw numbers: it is not to be tried.
    conversion = _internals.conversion_code
    is_conversion = conversion is not None and getattr(fn, "__code__", None) is conversion
    if is_conversion and recurse and settings.use_torch_tensors.on() and not _makes_new_parameters():
        with torch.no_grad():
            if _stays(self, fn):
                return self
    return _upstream_apply(self, fn, recurse)


def _makes_new_parameters() -> bool:
    return (
        torch.__future__.get_overwrite_module_params_on_conversion()
        or torch.__future__.get_swap_module_params_on_conversion()
    )


def _stays(module: torch.nn.Module, fn: Callable[[Tensor], Tensor]) -> bool:
    # Whether the function returns each of the modules' tensors, and converting them is all that `_apply` does
    for tensors in (module._parameters, module._buffers):
        for tensor in tensors.values():
            if tensor is not None and not _is_returned(tensor, fn):
                return False
    for child in module._modules.values():
        if child is not None and not (_has_one_of(child, "_apply", _APPLIES) and _stays(child, fn)):
            return False
    return True


def _is_returned(tensor: Tensor, fn: Callable[[Tensor], Tensor]) -> bool:
    if type(tensor) not in _TENSORS or fn(tensor) is not tensor:
        return False
    grad = tensor.grad if tensor.is_leaf else None
    return grad is None or fn(grad) is grad


def _has_one_of(module: torch.nn.Module, name: str, methods: tuple[Callable, ...]) -> bool:
    return getattr(type(module), name) in methods and name not in module.__dict__


_TENSORS = (Tensor, torch.nn.Parameter)
_TRAINS = (torch.nn.Module.train, _upstream_train, train)
_APPLIES = (torch.nn.Module._apply, _apply, Interval._apply)  # an Interval's bounds are buffers as well
