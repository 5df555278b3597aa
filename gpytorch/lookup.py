"""Looks a submodule of a module up in its `_modules`.

The losses, kernels and likelihoods ask for theirs at every step.
"""

from __future__ import annotations

import torch


def child(module: torch.nn.Module, name: str, cls: type) -> torch.nn.Module:
    """Return a module's child without asking for an attribute, which torch finds only after an error with its message:
    a training step asks several times.

    :param module: The module.
    :param name: The child's name.
    :param cls: The class that the module usually is of. Another one may have an attribute of that name.
    """
    own = module._modules.get(name) if type(module) is cls else None
    return getattr(module, name) if own is None else own
