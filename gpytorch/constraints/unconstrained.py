"""Reads a parameter as the raw tensor and the constraint to be applied to it, so that a kernel's gradient goes
through both at once."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _upstream
from .constraints import GreaterThan, Interval, LessThan, Positive

#: Upstream's constraints, modules in which no kernel and no prior is to be looked for.
CONSTRAINTS = frozenset({Interval, GreaterThan, LessThan, Positive})
_upstream.stands_for(*(cls.transform for cls in sorted(CONSTRAINTS, key=lambda cls: cls.__name__)))

#: A tensor; whether the parameter is the softplus of it; and the lower bound that is added to that, if not zero.
Unconstrained = tuple[Tensor, bool, Tensor | None]


def unconstrained(module: torch.nn.Module, name: str, owner: type) -> Unconstrained:
    """Return a parameter, before its constraint is applied where that is a softplus.

    :param module: The module that has the parameter.
    :param name: The parameter's name: "lengthscale" for what is made from "raw_lengthscale".
    :param owner: The class whose property of that name applies the constraint. One that overrides it has its way.
    """
    raw = module._parameters.get(f"raw_{name}")
    constraint = module._modules.get(f"raw_{name}_constraint")
    if raw is None or constraint is None or getattr(type(module), name) is not getattr(owner, name):
        return getattr(module, name), False, None
    cls, lower_bound = type(constraint), constraint._buffers.get("lower_bound")
    transform = constraint._modules.get("_transform")
    if (
        (cls is Positive or cls is GreaterThan)
        and type(transform) is torch.nn.Softplus
        and transform.beta == 1
        and transform.threshold == 20
        and lower_bound is not None
        and lower_bound.dim() == 0  # else it has a batch shape of its own
        and not lower_bound.requires_grad
    ):
        return raw, True, None if cls is Positive else lower_bound
    return getattr(module, name), False, None
