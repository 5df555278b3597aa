"""Where one machine's Cholesky is not enough, upstream's own ways go through the flag untouched, to the bit.

Conjugate gradients beyond `max_cholesky_size`, kernels spread over devices, and kernels whose matrix is never held.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec

import pytest
import torch
from both_ways import compare_step, exact_gp, inputs, routes
from linear_operator.operators import CatLinearOperator, KernelLinearOperator
from torch import Tensor

from gpytorch import dense, kernels, settings
from gpytorch.mlls import MarginalLogLikelihood
from gpytorch.models.exact_prediction_strategies import DefaultPredictionStrategy
from gpytorch.settings import use_torch_tensors

N, D = 40, 2
LIMIT = 10  # for max_cholesky_size: less than N, so that conjugate gradients take over


class OverTwoDevices(kernels.MultiDeviceKernel):
    """MultiDeviceKernel as it is with two GPUs, with the CPU as each of them.

    DataParallel turns itself off where there is no GPU; what it does for each device is done here one after the other.
    """

    def __init__(self, base_kernel: kernels.Kernel) -> None:
        super().__init__(base_kernel, [torch.device("cpu")] * 2, torch.device("cpu"), create_cuda_context=False)
        self.device_ids, self.dim = [0, 1], -2

    def scatter(self, inputs: tuple[Tensor], kwargs: dict, device_ids: list[int]) -> tuple[list, list]:
        parts = inputs[0].chunk(len(device_ids), dim=self.dim)
        return [(part,) for part in parts], [kwargs] * len(parts)

    def replicate(self, module: kernels.Kernel, device_ids: list[int]) -> list[kernels.Kernel]:
        return [module] * len(device_ids)

    def parallel_apply(self, replicas: list, inputs: list, kwargs: list) -> list:
        return [replica(*each, **more) for replica, each, more in zip(replicas, inputs, kwargs, strict=True)]


def _rbf(x1: Tensor, x2: Tensor, **params: Tensor) -> Tensor:
    return (-0.5 * (x1.unsqueeze(-2) - x2.unsqueeze(-3)).square().sum(-1)).exp()


class NeverHeld(kernels.RBFKernel):
    """An RBF kernel with the operator that KeOps' kernels have, and torch instead of KeOps behind it."""

    def forward(self, x1: Tensor, x2: Tensor, diag: bool = False, **params) -> Tensor | KernelLinearOperator:
        covar = KernelLinearOperator(x1 / self.lengthscale, x2 / self.lengthscale, covar_func=_rbf)
        return covar.diagonal(dim1=-1, dim2=-2) if diag else covar


def keops() -> kernels.Kernel:
    if find_spec("pykeops") is None:
        pytest.skip("pykeops is not installed")
    return kernels.keops.RBFKernel()


KERNELS: dict[str, Callable[[], kernels.Kernel]] = {
    "one device": kernels.RBFKernel,
    "over two devices": lambda: OverTwoDevices(kernels.RBFKernel()),
    "never held": NeverHeld,
    "keops": keops,
}
OPERATORS = {"over two devices": CatLinearOperator, "never held": KernelLinearOperator, "keops": KernelLinearOperator}


def gp(kernel: str) -> MarginalLogLikelihood:
    return exact_gp(kernels.ScaleKernel(KERNELS[kernel]()), inputs(N, D))


def predictions(mll: MarginalLogLikelihood, flag: bool) -> list[Tensor]:
    model, x = mll.model.eval(), inputs(5, D, seed=5)
    model.train()  # drops what the prediction before this one has cached
    model.eval()
    torch.manual_seed(0)  # of the probe vectors
    with use_torch_tensors(flag), torch.no_grad():
        posterior = model(x)
        return [posterior.mean, posterior.variance, posterior.covariance_matrix]


@pytest.mark.parametrize("kernel", OPERATORS)
def test_covariance_is_the_operator_that_it_is_upstream(kernel: str) -> None:
    with use_torch_tensors():
        covar = KERNELS[kernel]().double()(inputs(N, D)).evaluate_kernel()
    assert isinstance(covar, OPERATORS[kernel])


@pytest.mark.parametrize("kernel", KERNELS)
def test_training_step_by_conjugate_gradients_is_upstreams(kernel: str) -> None:
    with settings.max_cholesky_size(LIMIT):
        compare_step(gp(kernel), route="upstream")


@pytest.mark.parametrize("kernel", KERNELS)
def test_prediction_by_conjugate_gradients_is_upstreams(kernel: str) -> None:
    mll = gp(kernel)
    with settings.max_cholesky_size(LIMIT):
        expected = predictions(mll, flag=False)
        before = dense.routes["tensors"]
        actual = predictions(mll, flag=True)
    assert dense.routes["tensors"] == before
    assert type(mll.model.prediction_strategy) is DefaultPredictionStrategy
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(actual, expected, strict=True))


@pytest.mark.parametrize("kernel", ["never held", "keops"])
def test_matrix_that_is_never_held_is_not_held_for_cholesky_either(kernel: str) -> None:
    """Below `max_cholesky_size` upstream goes by Cholesky, too: by its own, not by that of the tensor path."""
    mll = gp(kernel)
    compare_step(mll, route="upstream")
    expected = predictions(mll, flag=False)
    with routes(upstream=1):
        actual = predictions(mll, flag=True)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(actual, expected, strict=True))


def test_fast_computations_on_and_many_rows_leave_the_default_limit_to_upstream() -> None:
    """At upstream's own settings: n = 801 of at most 800."""
    mll = exact_gp(kernels.ScaleKernel(kernels.RBFKernel()), inputs(801, D))
    with settings.max_preconditioner_size(5), settings.num_trace_samples(2), settings.cg_tolerance(1.0):
        compare_step(mll, route="upstream")
