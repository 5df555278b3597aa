"""The user's code, for all questions: an exact GP as GPyTorch's documentation writes it, its step, its prediction."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch

import gpytorch
from gpytorch.kernels import MaternKernel, RBFKernel, ScaleKernel

from .options import DTYPES
from .rows import Case

KERNELS = {"rbf": lambda **kwargs: RBFKernel(**kwargs), "matern": lambda **kwargs: MaternKernel(nu=2.5, **kwargs)}
EVERY_N = 10**9
D = 6  # inputs of a synthetic problem


class ExactGP(gpytorch.models.ExactGP):
    """ScaleKernel over an ARD kernel, a constant mean, Gaussian noise."""

    def __init__(self, train_x: torch.Tensor, train_y: torch.Tensor, kernel: str = "rbf") -> None:
        batch_shape = train_x.shape[:-2]
        super().__init__(train_x, train_y, gpytorch.likelihoods.GaussianLikelihood(batch_shape=batch_shape))
        self.mean_module = gpytorch.means.ConstantMean(batch_shape=batch_shape)
        base = KERNELS[kernel](ard_num_dims=train_x.shape[-1], batch_shape=batch_shape)
        self.covar_module = ScaleKernel(base, batch_shape=batch_shape)

    def forward(self, x: torch.Tensor) -> gpytorch.distributions.MultivariateNormal:
        """Return the prior at `x`."""
        return gpytorch.distributions.MultivariateNormal(self.mean_module(x), self.covar_module(x))


def make_model(train_x: torch.Tensor, train_y: torch.Tensor, kernel: str = "rbf") -> ExactGP:
    """Return a model at GPyTorch's initial hyperparameters, but for the lengthscale.

    Distances grow like sqrt(d); with a lengthscale that does not, the covariance of 64 inputs is the identity and
    its gradient zero.
    """
    model = ExactGP(train_x, train_y, kernel).to(train_x)
    model.covar_module.base_kernel.lengthscale = math.sqrt(train_x.shape[-1])
    return model


def training_step(model: ExactGP, mll: gpytorch.mlls.MarginalLogLikelihood | None = None) -> Callable[[], torch.Tensor]:
    """Return the step without the optimizer: zero_grad, forward, backward. It returns the loss.

    :param mll: What is maximized (Default: the exact marginal log likelihood).
    """
    mll = mll or gpytorch.mlls.ExactMarginalLogLikelihood(model.likelihood, model)
    (train_x,), train_y = model.train_inputs, model.train_targets

    def step() -> torch.Tensor:
        model.zero_grad()
        loss = -mll(model(train_x), train_y).sum()
        loss.backward()
        return loss.detach()

    return step


def loss_and_gradient(model: torch.nn.Module, step: Callable[[], torch.Tensor]) -> torch.Tensor:
    """Return the loss of a step and the gradients it leaves on `model`'s parameters as one vector in float64."""
    loss = step()
    gradients = [parameter.grad.reshape(-1) for parameter in model.parameters() if parameter.grad is not None]
    return torch.cat([loss.reshape(1), *gradients]).detach().double().cpu()


def mean_and_variance(model: ExactGP, test_x: torch.Tensor) -> torch.Tensor:
    """Return the posterior's mean and variance at the test points as one tensor."""
    with torch.no_grad():
        posterior = model(test_x)
        return torch.cat([posterior.mean, posterior.variance])


def sample_problem(
    n: int, d: int, dtype: torch.dtype, device: str, batch: int = 1, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return inputs, uniform on the unit cube, and targets: a smooth function of them plus noise.

    :return: Inputs `(n, d)` and targets `(n,)`; with `batch` > 1, `(batch, n, d)` and `(batch, n)`.
    """
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, n) if batch > 1 else (n,)
    x = torch.rand(*shape, d, generator=generator, dtype=torch.float64)
    y = torch.sin(3 * x).sum(-1) + 0.3 * torch.randn(shape, generator=generator, dtype=torch.float64)
    y = (y - y.mean(-1, keepdim=True)) / y.std(-1, keepdim=True, correction=min(1, n - 1))
    return x.to(dtype=dtype, device=device), y.to(dtype=dtype, device=device)


def problem_of(case: Case) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the training inputs and targets of `case`."""
    return sample_problem(case.n, case.d, DTYPES[case.dtype], case.device, case.batch)


def test_points_of(case: Case) -> torch.Tensor:
    """Return the test inputs of `case`."""
    return sample_problem(case.m, case.d, DTYPES[case.dtype], case.device, case.batch, seed=1)[0]


def model_of(case: Case) -> ExactGP:
    """Return a model of the training data of `case`."""
    return make_model(*problem_of(case), case.kernel)


@contextmanager
def cholesky_up_to(n: int) -> Iterator[None]:
    """Let GPyTorch use Cholesky up to `n`, whatever the process (importing BoTorch, say) has set before.

    Its own limit is n = 800; beyond it, it takes conjugate gradients, another method with another answer.
    """
    with gpytorch.settings.max_cholesky_size(n), gpytorch.settings.fast_computations(True, True, True):
        yield


dense_at_every_n = partial(cholesky_up_to, EVERY_N)
