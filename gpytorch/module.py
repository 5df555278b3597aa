"""Modules whose gradients are forgotten without making up the names of their parameters."""

from __future__ import annotations

import torch

from . import _upstream, settings

_upstream.extend(__name__)

_torch_zero_grad = torch.nn.Module.zero_grad
_OWN = ("_is_replica", "parameters", "named_parameters", "named_modules", "_named_members")


@_upstream.replaces(Module)  # noqa: F821 (from the installed module)
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
    # What torch asks to find the parameters, none of it overridden, and no replica, of which torch warns
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
