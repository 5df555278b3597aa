"""Modules whose gradients are forgotten without making up the names of their parameters."""

from __future__ import annotations

import torch

from . import _upstream, settings

_upstream.extend(__name__)

_torch_zero_grad = torch.nn.Module.zero_grad


@_upstream.replaces(Module)  # noqa: F821 (from the installed module)
def zero_grad(self, set_to_none: bool = True) -> None:
    """
    With :class:`gpytorch.settings.use_torch_tensors` on, the modules are walked through once, without names, at a third
    of the time.
    """
    if settings.use_torch_tensors.off() or not set_to_none or not _has_torchs_parameters(self):
        _torch_zero_grad(self, set_to_none)
    else:
        _forget_gradients(self, set())


def _has_torchs_parameters(module: torch.nn.Module) -> bool:
    # What torch asks to find the parameters, none of it overridden, and no replica, of which torch warns
    cls = type(module)
    return "_is_replica" not in module.__dict__ and all(
        getattr(cls, name) is getattr(torch.nn.Module, name)
        for name in ("parameters", "named_parameters", "named_modules", "_named_members")
    )


def _forget_gradients(module: torch.nn.Module, seen: set[torch.nn.Module]) -> None:
    seen.add(module)
    for parameter in module._parameters.values():
        if parameter is not None:
            parameter.grad = None
    for child in module._modules.values():
        if child is not None and child not in seen:
            _forget_gradients(child, seen)
