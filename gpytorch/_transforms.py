"""Asks whether `torch.func`, forward-mode AD or `torch.compile` is at work around a call.

Every hand-written backward does, since it serves none of them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from . import _internals
from .settings import trace_mode


class UntransformedFunction(Function):
    """A Function that is applied only where :func:`is_transformed` says no."""

    @classmethod
    def apply(cls, *args: Any) -> Tensor:
        """See :class:`torch.autograd.Function`. What that does for `torch.func` only is left out."""
        return super(Function, cls).apply(*args)


def below_autograd(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Let none of a function's operations go by autograd where that has nothing to record: in the forward of a
    Function, or without gradients. For a small matrix, which takes dozens of operations, that is a twentieth of the
    time.

    :param function: The function.
    """

    @wraps(function)
    def run(*args: Any) -> Tensor:
        with _internals.below_autograd():
            return function(*args)

    return run


def is_transformed() -> bool:
    """Return whether the call runs under `torch.func`, forward-mode AD, `torch.compile`, or `torch.jit.trace` in
    :class:`gpytorch.settings.trace_mode`.

    An autograd Function with a hand-written backward that works in place serves none of them; plain torch operations
    serve all.
    """
    return torch.compiler.is_compiling() or is_differentiated_by_transforms() or trace_mode.on()


def is_differentiated_by_transforms() -> bool:
    """Return whether the call runs under `torch.func` or forward-mode AD, which no hand-written backward serves."""
    return _internals.are_transforms_active() or _internals.is_forward_mode()


def is_vmapped() -> bool:
    """Return whether the call runs under `torch.vmap`, where no value may decide what is computed next."""
    return _internals.are_transforms_active() and any(
        transform.key() == _internals.VMAP for transform in _internals.transforms()
    )


def must_be_differentiable(*grads: Tensor | None) -> bool:
    """Return whether a backward is itself being recorded, batched or compiled: it may not work in place.

    :param grads: The cotangents that reach it. With `is_grads_batched` they alone tell.
    """
    return (
        torch.is_grad_enabled()
        or torch.compiler.is_compiling()
        or _internals.are_transforms_active()
        or any(grad is not None and _internals.is_batched_cotangent(grad) for grad in grads)
    )
