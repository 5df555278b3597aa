"""Parameters before their constraint is applied."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .constraints import GreaterThan, Interval, LessThan, Positive


class Softplus(NamedTuple):
    """A parameter before its constraint is applied: `softplus(raw) + lower_bound`.

    :ivar raw: What is optimized.
    :ivar lower_bound: The parameter's lower bound, if it is not zero.
    """

    raw: Tensor
    lower_bound: Tensor | None


_CONSTRAINTS = {Interval, GreaterThan, LessThan, Positive}


def is_constraint(module: torch.nn.Module) -> bool:
    """Return whether a module is one of upstream's constraints, in which no kernel and no prior is to be looked for."""
    return type(module) in _CONSTRAINTS


def unconstrained(module: torch.nn.Module, name: str, owner: type) -> Tensor | Softplus:
    """Return a parameter, before its constraint is applied where that is a softplus.

    :param module: The module that has the parameter.
    :param name: The parameter's name: "lengthscale" for what is made from "raw_lengthscale".
    :param owner: The class whose property of that name applies the constraint. One that overrides it has its way.
    """
    raw = module._parameters.get(f"raw_{name}")
    constraint = module._modules.get(f"raw_{name}_constraint")
    if raw is not None and getattr(type(module), name) is getattr(owner, name) and _is_softplus(constraint):
        return Softplus(raw, None if type(constraint) is Positive else constraint._buffers["lower_bound"])
    return getattr(module, name)


def _is_softplus(constraint: torch.nn.Module | None) -> bool:
    if type(constraint) is not Positive and type(constraint) is not GreaterThan:
        return False
    lower_bound = constraint._buffers.get("lower_bound")
    if lower_bound is None or lower_bound.dim() > 0 or lower_bound.requires_grad:
        return False  # it has a batch shape or a gradient of its own
    transform = constraint._transform
    return type(transform) is torch.nn.Softplus and transform.beta == 1 and transform.threshold == 20
