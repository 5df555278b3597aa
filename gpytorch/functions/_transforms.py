"""Which of torch's program transformations are at work around a call."""

from __future__ import annotations

import torch
from torch._C._functorch import TransformType
from torch._functorch.pyfunctorch import retrieve_all_functorch_interpreters
from torch.autograd import forward_ad


def is_transformed() -> bool:
    """Return whether the call runs under `torch.func`, forward-mode AD, or `torch.compile`.

    An autograd Function with a hand-written backward serves none of them; plain torch operations serve all.
    """
    return (
        torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0
    )


def is_vmapped() -> bool:
    """Return whether the call runs under `torch.vmap`, where no value may decide what is computed next."""
    return torch._C._are_functorch_transforms_active() and any(
        interpreter.key() == TransformType.Vmap for interpreter in retrieve_all_functorch_interpreters()
    )


def must_be_differentiable() -> bool:
    """Return whether a backward that asks is itself being recorded or batched, and so may not work in place."""
    return torch.is_grad_enabled() or torch._C._are_functorch_transforms_active()
