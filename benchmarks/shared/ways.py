"""The ways to run the same code of the user's, each a context manager; all questions compare some of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import torch
from linear_operator.operators import _linear_operator

import gpytorch
from gpytorch import dense
from gpytorch.distributions import MultivariateNormal

STOCK, NO_COPY, LOG_PROB, TENSORS = "stock", "stock without copy", "log_prob only", "tensors"


@contextmanager
def _assigned(owner: Any, name: str, value: Any) -> Iterator[None]:
    with gpytorch.settings.use_torch_tensors(False):
        original = getattr(owner, name)
        setattr(owner, name, value)
        try:
            yield
        finally:
            setattr(owner, name, original)


def _without_copy(psd_safe_cholesky: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Return `psd_safe_cholesky` with a result whose `contiguous` copies nothing: LAPACK's order is kept."""

    def factorize(*args: Any, **kwargs: Any) -> torch.Tensor:
        factor = psd_safe_cholesky(*args, **kwargs)

        def contiguous() -> torch.Tensor:
            del factor.contiguous  # or the factor would hold itself until the next garbage collection
            return factor

        factor.contiguous = contiguous
        return factor

    return factorize


def _log_prob_on_tensors(self: MultivariateNormal, value: torch.Tensor) -> torch.Tensor:
    """Return the log density as the pull request does: `log_prob` on tensors, everything before it on operators."""
    difference = (value - self.loc).unsqueeze(-1)
    covariance = self.lazy_covariance_matrix.to_dense()
    inv_quad, logdet = gpytorch.functions.TensorInvQuadLogdet.apply(covariance, difference)
    return -0.5 * (inv_quad + logdet + value.size(-1) * math.log(2 * math.pi))


WAYS: dict[str, Callable[[], AbstractContextManager]] = {
    STOCK: partial(gpytorch.settings.use_torch_tensors, False),
    NO_COPY: partial(
        _assigned, _linear_operator, "psd_safe_cholesky", _without_copy(_linear_operator.psd_safe_cholesky)
    ),
    LOG_PROB: partial(_assigned, MultivariateNormal, "log_prob", _log_prob_on_tensors),
    TENSORS: partial(gpytorch.settings.use_torch_tensors, True),
}


WAYS_CAPTION = (
    f"Ways: {STOCK} is the flag off, {TENSORS} the flag on, {LOG_PROB} what upstream's pull request #2682 does."
)


def takes_tensors(work: Callable[[], Any]) -> bool:
    """Run `work` and return whether a covariance was factorized as a tensor on the way."""
    before = dense.routes["tensors"]
    work()
    return dense.routes["tensors"] > before


def run_in(way: str, work: Callable[[], Any]) -> Callable[[], Any]:
    """Return `work` run in the way of that name."""

    def run() -> Any:
        with WAYS[way]():
            return work()

    return run
