"""Models whose forward is of all the points that it is given: those at a prediction are training and test points."""

from __future__ import annotations

import pytest
import torch
from both_ways import GP, RTOL, assert_near, inputs, is_given_parts, scatter, targets
from torch import Tensor

from gpytorch import kernels as k
from gpytorch import likelihoods, means
from gpytorch.distributions import MultivariateNormal
from gpytorch.kernels import Kernel
from gpytorch.lazy import LazyEvaluatedKernelTensor
from gpytorch.models.dense_prediction_strategy import DensePredictionStrategy
from gpytorch.settings import use_torch_tensors

N, D = 9, 2


class Watching(GP):
    """A GP that notes how many points its forward is given."""

    def __init__(self, mean: means.Mean | None = None, kernel: Kernel | None = None) -> None:
        x = inputs(N, D)
        kernel = k.ScaleKernel(k.RBFKernel(ard_num_dims=D)) if kernel is None else kernel
        super().__init__(x, targets(x), kernel, likelihoods.GaussianLikelihood(), mean)
        scatter(self.double()).eval()
        self.given: list[int] = []

    def forward(self, x: Tensor) -> MultivariateNormal:
        self.given.append(x.size(-2))
        return MultivariateNormal(self.mean_of(x), self.covariance_of(x))

    def mean_of(self, x: Tensor) -> Tensor:
        return self.mean_module(x)

    def covariance_of(self, x: Tensor) -> object:
        return self.covar_module(x)


class OfTheirCentre(means.Mean):
    """A mean that is linear in the distance from the mean of all points."""

    def forward(self, x: Tensor) -> Tensor:
        return (x - x.mean(-2, keepdim=True)).sum(-1)


class AddsTheirMean(Watching):
    def mean_of(self, x: Tensor) -> Tensor:
        return self.mean_module(x) + x.mean((-2, -1), keepdim=True).squeeze(-1)


class IsTheirMean(Watching):
    def mean_of(self, x: Tensor) -> Tensor:
        return x.mean((-2, -1), keepdim=True).squeeze(-1).expand(x.shape[:-1])


class AddsTheirSpreadInPlace(Watching):
    def mean_of(self, x: Tensor) -> Tensor:
        return self.mean_module(x).contiguous().add_(x.std(-2).sum(-1, keepdim=True))


class IsNormalizedOverThem(Watching):
    def mean_of(self, x: Tensor) -> Tensor:
        normalized = (x - x.mean(-2, keepdim=True)) / x.std(-2, keepdim=True, unbiased=False).clamp_min(0.1)
        return self.mean_module(normalized) + normalized[..., 0]


class HasItsKernelScaledByThem(Watching):
    def covariance_of(self, x: Tensor) -> object:
        kernel = k.ScaleKernel(self.covar_module)
        kernel.outputscale = x.detach().std()
        return kernel.double()(x)


class ChoosesItsKernelByTheirNumber(Watching):
    def __init__(self) -> None:
        super().__init__()
        self.other_module = k.MaternKernel(1.5).double()

    def covariance_of(self, x: Tensor) -> object:
        return (self.covar_module if x.size(-2) >= N else self.other_module)(x)


class ChoosesItsMeanByTheirNumber(Watching):
    def mean_of(self, x: Tensor) -> Tensor:
        return self.mean_module(x) if x.size(-2) <= N else 2 * self.mean_module(x)


class HandsItsKernelTheirDistances(Watching):
    def covariance_of(self, x: Tensor) -> object:
        return self.covar_module(torch.tanh(3 * (x - x.mean(-2, keepdim=True))))


TOGETHER = {
    "a mean of their centre": lambda: Watching(OfTheirCentre()),
    "their mean added": AddsTheirMean,
    "their mean alone": IsTheirMean,
    "their spread added in place": AddsTheirSpreadInPlace,
    "normalized over them": IsNormalizedOverThem,
    "a zero mean and their mean": lambda: AddsTheirMean(means.ZeroMean()),
    "a linear mean and their mean": lambda: AddsTheirMean(means.LinearMean(D)),
    "a kernel scaled by them": HasItsKernelScaledByThem,
    "a kernel chosen by their number": ChoosesItsKernelByTheirNumber,
    "distances from their centre for the kernel": HandsItsKernelTheirDistances,
    "their mean added, no closed form": lambda: AddsTheirMean(kernel=k.PiecewisePolynomialKernel(q=2)),
    "distances from their centre for the kernel, no closed form": lambda: HandsItsKernelTheirDistances(
        kernel=k.PiecewisePolynomialKernel(q=2)
    ),
}
ALONE = {
    "constant mean": Watching,
    "constant mean, no closed form": lambda: Watching(kernel=k.PiecewisePolynomialKernel(q=2)),
    "constant mean, active dimensions": lambda: Watching(kernel=k.RBFKernel(active_dims=[1])),
}


def read(model: Watching, x: Tensor) -> list[Tensor]:
    x = x.clone().requires_grad_()
    posterior = model(x)
    values = [posterior.mean, posterior.variance, posterior.covariance_matrix]
    grad = torch.autograd.grad(sum(value.sum() for value in values), x)[0]
    return [*(value.detach() for value in values), grad]


def everything(model: Watching, flag: bool, shape: tuple[int, ...]) -> list[Tensor]:
    """A posterior, and that of fantasies."""
    with use_torch_tensors(flag):
        model.train().eval()
        found = read(model, inputs(shape[-1], D, shape[:-1], seed=5))
        # Upstream asks a kernel for its strategy only where the covariance is that of one kernel.
        is_of_kernel = isinstance(model.prediction_strategy.train_prior_dist._covar, LazyEvaluatedKernelTensor)
        assert (type(model.prediction_strategy) is DensePredictionStrategy) == (flag and is_of_kernel)
        x = inputs(2, D, seed=7)
        return found + read(model.get_fantasy_model(x, targets(x)), inputs(3, D, seed=5))


@pytest.mark.parametrize("shape", [(1,), (4,), (3, 2)])
@pytest.mark.parametrize("kind", [*TOGETHER, *ALONE])
def test_forward_of_all_points_together_matches_upstream(kind: str, shape: tuple[int, ...]) -> None:
    model = {**TOGETHER, **ALONE}[kind]()
    expected, actual = (everything(model, flag, shape) for flag in (False, True))
    for ours, theirs in zip(actual, expected, strict=True):
        assert_near(ours, theirs, kind, rtol=10 * RTOL, atol=1e-12)


@is_given_parts
@pytest.mark.parametrize("kind", ["a zero mean and their mean", "their mean alone", *ALONE])
def test_forward_is_given_the_test_points_alone_where_mean_and_kernel_are_of_each_point(kind: str) -> None:
    model = {**TOGETHER, **ALONE}[kind]()
    everything(model, True, (4,))
    assert model.given[:3] == ([N, 4, N + 2] if kind in ALONE else [N, N + 4, N + 2])
