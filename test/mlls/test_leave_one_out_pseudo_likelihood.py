"""The leave-one-out pseudo likelihood with the flag on, against upstream's and against its definition."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from both_ways import assert_near, evaluate, exact_gp, inputs, loss, targets
from torch import Tensor

from gpytorch import kernels as k
from gpytorch import likelihoods, means, priors
from gpytorch.mlls import LeaveOneOutPseudoLikelihood, MarginalLogLikelihood
from gpytorch.settings import use_torch_tensors

leave_one_out = partial(exact_gp, mll=LeaveOneOutPseudoLikelihood)

BATCH = torch.Size([3])
CASES = {
    "rbf ard": lambda: leave_one_out(k.ScaleKernel(k.RBFKernel(ard_num_dims=2)), inputs(12)),
    "matern and periodic": lambda: leave_one_out(k.MaternKernel(2.5) * k.PeriodicKernel(), inputs(12)),
    "without closed form": lambda: leave_one_out(k.PiecewisePolynomialKernel(), inputs(12)),
    "linear": lambda: leave_one_out(k.LinearKernel(), inputs(12)),
    "fixed noise": lambda: leave_one_out(
        k.RBFKernel(),
        inputs(12),
        likelihood=likelihoods.FixedNoiseGaussianLikelihood(0.1 + inputs(12)[:, 0], learn_additional_noise=True),
    ),
    "batch": lambda: leave_one_out(
        k.ScaleKernel(k.RBFKernel(batch_shape=BATCH), batch_shape=BATCH),
        inputs(12, batch=(3,)),
        likelihood=likelihoods.GaussianLikelihood(batch_shape=BATCH),
        mean=means.ConstantMean(batch_shape=BATCH),
    ),
    "priors": lambda: leave_one_out(k.RBFKernel(lengthscale_prior=priors.GammaPrior(3.0, 6.0)), inputs(12)),
    "one point": lambda: leave_one_out(k.RBFKernel(), inputs(1)),
}


@pytest.mark.parametrize("case", CASES)
def test_step_matches_upstream(case: str) -> None:
    mll = CASES[case]()
    leaves = dict(mll.named_parameters())
    off, on = (evaluate(lambda: loss(mll), leaves, flag) for flag in (False, True))
    on.assert_near(off)


def left_out(mll: MarginalLogLikelihood, x: Tensor, y: Tensor, i: int) -> Tensor:
    """The log probability of one target given all the others, from the definition."""
    covar = mll.model.covar_module(x).to_dense() + mll.likelihood.noise * torch.eye(len(x))
    mean, others = mll.model.mean_module(x), torch.arange(len(x)) != i
    weights = torch.linalg.solve(covar[others][:, others], covar[others, i])
    predicted = mean[i] + weights @ (y - mean)[others]
    return torch.distributions.Normal(predicted, (covar[i, i] - weights @ covar[others, i]).sqrt()).log_prob(y[i])


def test_value_is_the_mean_of_what_each_target_gets_from_the_others() -> None:
    x, y = inputs(8), targets(inputs(8))
    mll = leave_one_out(k.ScaleKernel(k.RBFKernel()), x, y)
    expected = torch.stack([left_out(mll, x, y, i) for i in range(8)]).mean()
    with use_torch_tensors():
        assert_near(-loss(mll).detach(), expected.detach(), rtol=1e-10)
