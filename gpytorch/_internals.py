"""What the overlay takes from torch and linear_operator beyond their public interface, each with its reason.

It is looked up here, once, when the package is imported. What a release lacks is replaced by a public way where that
costs little. Else it stands in :data:`missing`, and :func:`gpytorch._upstream.lay_over` leaves GPyTorch as it is, with
a warning. What is taken from GPyTorch itself is guarded by the sources of its methods: see :mod:`gpytorch._upstream`.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Hashable
from contextlib import nullcontext
from typing import Any

import linear_operator
import torch
from linear_operator.operators import AddedDiagLinearOperator, ConstantDiagLinearOperator, DenseLinearOperator
from torch.autograd import forward_ad

#: The first and the last release of torch that the test suite ran against, and what to install.
SUPPORTED = ("2.4", "2.15")
REQUIREMENT = "torch>={},<={}".format(*SUPPORTED)

#: The names that the installed torch and linear_operator lack.
missing: list[str] = []


def _look_up(name: str, otherwise: Any = None) -> Any:
    try:
        return pkgutil.resolve_name(name)
    except (ImportError, AttributeError):
        if otherwise is None:
            missing.append(name)
        return otherwise


def _expect(thing: object, *names: str) -> None:
    missing.extend(f"{type(thing).__name__}.{name}" for name in names if not hasattr(thing, name))


def installed() -> str:
    """Return what was looked at."""
    return f"torch {torch.__version__} with linear_operator {linear_operator.__version__}"


# A forward takes dozens of small operations. Where autograd has nothing to record of them, asking it each time is a
# twentieth of a training step.
below_autograd = _look_up("torch._C._AutoDispatchBelowAutograd", otherwise=nullcontext)

# The apply of a Function's base, which does not look for transforms of torch.func a second time.
_look_up("torch._C._FunctionBase.apply")

# Whether transforms of torch.func are at work, and which: no hand-written backward serves them.
are_transforms_active = _look_up("torch._C._are_functorch_transforms_active")
transforms = _look_up("torch._functorch.pyfunctorch.retrieve_all_functorch_interpreters")
VMAP = _look_up("torch._C._functorch.TransformType.Vmap")

# Whether a tensor is one of theirs, whose values cannot be read, or a cotangent of `is_grads_batched`.
is_wrapped = _look_up("torch._C._functorch.is_functorch_wrapped_tensor")
is_batched_cotangent = _look_up("torch._C._functorch.is_legacy_batchedtensor")

# The level of forward-mode AD, read in :func:`is_forward_mode`.
_look_up("torch.autograd.forward_ad._current_level")

# How many modes see every operation, such as that of fake tensors, of which nothing is to be remembered.
num_dispatch_modes = _look_up("torch._C._len_torch_dispatch_stack")

# Whether the backward at work reaches a node. Without an answer cotangents are computed that nobody reads.
will_execute = _look_up("torch._C._will_engine_execute_node", otherwise=lambda node: True)

# Whether another backward may follow the one at work (from torch 2.5 on). Without an answer nothing of the graph is
# overwritten, at the cost of one more matrix.
is_graph_kept = _look_up("torch._C._autograd._get_current_graph_task_keep_graph", otherwise=lambda: True)

# Products of several tensors with one, which are launched together on CUDA.
multiplied = _look_up("torch._foreach_mul")

# Whether all elements are true, which torch.vmap lets decide.
is_all_true = _look_up("torch._is_all_true")

# The derivative of softplus, and the operator below its Python wrapper.
softplus_backward = _look_up("torch.ops.aten.softplus_backward.default")
softplus_backward = getattr(softplus_backward, "_op", softplus_backward)

# The code of the function that Module.to hands to Module._apply. Where there is none, no module is left as it is.
_constants = getattr(getattr(torch.nn.Module.to, "__code__", None), "co_consts", ())
conversion_code = next((each for each in _constants if getattr(each, "co_name", None) == "convert"), None)

# What a module holds; its public iterators make up names, which takes as long as a small matrix product.
_expect(torch.nn.Module(), "_parameters", "_buffers", "_modules", "_apply", "_named_members")

# What a tensor is a view of, whether it is one, and how often it was written to.
_expect(torch.empty(0), "_base", "_is_view", "_version")

#: Where upstream's MultivariateNormal keeps its factor.
SCALE_TRIL = "_MultivariateNormal__unbroadcasted_scale_tril"

# What an operator is made of.
_SUM = AddedDiagLinearOperator(
    DenseLinearOperator(torch.eye(1)), ConstantDiagLinearOperator(torch.ones(1), diag_shape=1)
)
_expect(_SUM, "_args", "_differentiable_kwargs", "_nondifferentiable_kwargs", "_linear_op", "_diag_tensor", "_cholesky")


def is_forward_mode() -> bool:
    """Return whether a level of forward-mode AD is open."""
    return forward_ad._current_level >= 0


def memoized_names(owner: object) -> list[str]:
    """Return the names under which linear_operator's `cached` keeps results for an object.

    :param owner: An operator or a prediction strategy.
    """
    return [key if isinstance(key, str) else key[0] for key in getattr(owner, "_memoize_cache", ())]


def memoized_arguments(owner: object, name: str) -> list[tuple[Hashable, ...]]:
    """Return the arguments with which a method was called whose results `cached` keeps.

    :param owner: An operator or a prediction strategy.
    :param name: The name under which they are kept.
    """
    return [key[1] for key in getattr(owner, "_memoize_cache", ()) if not isinstance(key, str) and key[0] == name]
