"""On CUDA: the CPU's numbers, batched and not, and no wait but the one for the check of the factorization."""

from __future__ import annotations

import copy
import warnings
from importlib import import_module

import pytest
import torch
from both_ways import GP, assert_near, evaluate, inputs, loss, routes, scatter, targets
from torch import Tensor

from gpytorch import kernels, means, settings
from gpytorch.functions.cholesky_inverse import cholesky_inverse_
from gpytorch.likelihoods import GaussianLikelihood
from gpytorch.mlls import ExactMarginalLogLikelihood, MarginalLogLikelihood
from gpytorch.settings import use_torch_tensors

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")

N, D = 60, 3
LARGE = 1500
RTOL = {torch.float64: 1e-8, torch.float32: 2e-3}
BASES = {"rbf": lambda **k: kernels.RBFKernel(**k), "matern": lambda **k: kernels.MaternKernel(nu=2.5, **k)}


def gp(
    kernel: str, batch: tuple[int, ...] = (), n: int = N, dtype: torch.dtype = torch.float64
) -> MarginalLogLikelihood:
    x = inputs(n, D, batch, dtype=dtype)
    base = BASES[kernel](ard_num_dims=D, batch_shape=torch.Size(batch))
    covar = kernels.ScaleKernel(base, batch_shape=torch.Size(batch))
    likelihood = GaussianLikelihood(batch_shape=torch.Size(batch))
    model = GP(x, targets(x), covar, likelihood, means.ConstantMean(batch_shape=torch.Size(batch))).to(dtype)
    return scatter(ExactMarginalLogLikelihood(likelihood, model)).train()


def step(mll: MarginalLogLikelihood, flag: bool = True) -> list[Tensor]:
    result = evaluate(lambda: loss(mll).sum(), dict(mll.named_parameters()), flag)
    return [tensor.cpu() for tensor in (result.value, *result.grads.values())]


def predictions(mll: MarginalLogLikelihood, batch: tuple[int, ...], flag: bool = True) -> list[Tensor]:
    model = mll.model.eval()
    x, new = (inputs(5, D, batch, seed=seed).to(model.train_targets) for seed in (5, 7))
    found = []
    with use_torch_tensors(flag), torch.no_grad():
        posterior = model(x)
        found += [posterior.mean, posterior.variance, posterior.covariance_matrix]
        found += [model.likelihood(posterior).covariance_matrix]
        fantasy = model.get_fantasy_model(new, targets(new.cpu()).to(new))(x)
        found += [fantasy.mean, fantasy.covariance_matrix]
    return [tensor.cpu() for tensor in found]


@pytest.mark.parametrize("dtype", RTOL)
@pytest.mark.parametrize("batch", [(), (3,), (2, 2)])
@pytest.mark.parametrize("kernel", BASES)
def test_training_step_on_cuda_is_the_cpus(kernel: str, batch: tuple[int, ...], dtype: torch.dtype) -> None:
    mll = gp(kernel, batch, dtype=dtype)
    expected = step(mll, flag=False)
    mll = copy.deepcopy(mll).cuda()
    with routes(tensors=1):
        actual = step(mll)
    for ours, theirs in zip(actual, expected, strict=True):
        assert_near(ours, theirs, rtol=RTOL[dtype], atol=1e-12)


@pytest.mark.parametrize("batch", [(), (3,)])
@pytest.mark.parametrize("kernel", BASES)
def test_posterior_and_fantasies_on_cuda_are_the_cpus(kernel: str, batch: tuple[int, ...]) -> None:
    expected = predictions(gp(kernel, batch), batch, flag=False)
    actual = predictions(gp(kernel, batch).cuda(), batch)
    for ours, theirs in zip(actual, expected, strict=True):
        assert_near(ours, theirs, atol=1e-12)


def test_large_training_step_on_cuda_is_the_cpus() -> None:
    with settings.max_cholesky_size(LARGE):
        expected = step(gp("rbf", n=LARGE))
        actual = step(gp("rbf", n=LARGE).cuda())
    for ours, theirs in zip(actual, expected, strict=True):
        assert_near(ours, theirs, atol=1e-12)


@pytest.mark.parametrize("up_to", [10**6, 400], ids=["product", "halves"])
@pytest.mark.parametrize("batch", [(), (3,)])
@pytest.mark.parametrize("n", [N, LARGE])
def test_inverse_on_cuda_is_the_inverse(
    n: int, batch: tuple[int, ...], up_to: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(import_module("gpytorch.functions.cholesky_inverse"), "_PRODUCT_ON_CUDA_UP_TO", up_to)
    root = inputs(n, n, batch).cuda()
    matrix = root @ root.mT / n + torch.eye(n, dtype=root.dtype, device="cuda")
    inverse = cholesky_inverse_(torch.linalg.cholesky(matrix))
    identity = torch.eye(n, dtype=root.dtype).expand(*batch, n, n)
    assert_near((inverse @ matrix).cpu(), identity, rtol=1e-10)


@pytest.mark.parametrize("n", [N, 400, LARGE])
def test_sums_over_the_inverse_on_cuda_are_as_exact_in_float32_as_by_solves(n: int) -> None:
    errors = []
    for seed in range(8):
        x = inputs(n, 1, seed=seed).cuda()
        kernel, identity = (x - x.mT).square().neg().exp(), torch.eye(n, dtype=x.dtype, device=x.device)
        factor = torch.linalg.cholesky(kernel + 0.1 * identity).float()
        solved = torch.cholesky_solve(identity.float(), factor)
        inverses = torch.cholesky_inverse(factor.double()), solved, cholesky_inverse_(factor.mT.contiguous().mT)
        exact, theirs, ours = ((inverse.double() * kernel).sum().cpu() for inverse in inverses)
        errors.append(torch.stack([ours - exact, theirs - exact]).abs() / exact)
    ours, theirs = torch.stack(errors).clamp_min(1e-9).log().mean(0).exp()
    assert ours <= 2 * theirs


@pytest.mark.parametrize("batch", [(), (3,)])
def test_training_step_on_cuda_waits_once(batch: tuple[int, ...]) -> None:
    mll = gp("rbf", batch).cuda()
    with use_torch_tensors():
        loss(mll).sum().backward()
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                loss(mll).sum().backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    waits = [str(warning.message) for warning in caught if "synchronizing CUDA operation" in str(warning.message)]
    assert len(waits) <= 1, waits
