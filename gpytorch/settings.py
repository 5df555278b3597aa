"""The flag that takes exact GPs onto plain tensors."""

from __future__ import annotations

import os

from . import _upstream

_upstream.extend(__name__)

_ENVIRONMENT_VARIABLE = "GPYTORCH_USE_TORCH_TENSORS"


def _default_from_environment() -> bool:
    value = os.environ.get(_ENVIRONMENT_VARIABLE, "").strip().lower()
    if value in ("", "0", "false", "off"):
        return False
    if value in ("1", "true", "on"):
        return True
    raise ValueError(
        f"{_ENVIRONMENT_VARIABLE} is {os.environ[_ENVIRONMENT_VARIABLE]!r}; it must be one of 1/0, true/false, on/off."
    )


class use_torch_tensors(_feature_flag):  # noqa: F821 (from the installed gpytorch.settings)
    """
    Whether or not to train and query exact GPs on plain :class:`torch.Tensor` objects wherever a covariance matrix
    would be factorized as a dense matrix anyway. Values, gradients, warnings and errors stay the same to rounding.
    Covariance matrices with structure (diagonal, Kronecker, low rank, ...), and those of more than
    :class:`max_cholesky_size` rows while :class:`fast_computations` has `log_prob` on, are left to their
    :obj:`~linear_operator.LinearOperator`.

    The environment variable `GPYTORCH_USE_TORCH_TENSORS` (1/0, true/false, on/off), read when `gpytorch` is imported,
    sets the default.

    (Default: False)
    """

    _default = _default_from_environment()

    # A training step asks a dozen times: in one call, not in the two of other flags.
    @classmethod
    def on(cls) -> bool:
        return cls._default if cls._state is None else cls._state


__all__ += ["use_torch_tensors"]  # noqa: F821 (from the installed gpytorch.settings)
