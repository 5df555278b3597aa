"""The leave-one-out pseudo likelihood with the flag on, against upstream's and against its definition."""

from __future__ import annotations

import warnings
from functools import partial

import pytest
import torch
from both_ways import assert_near, evaluate, exact_gp, inputs, loss, routes, targets
from linear_operator.utils.errors import NotPSDError
from torch import Tensor

from gpytorch import kernels as k
from gpytorch import likelihoods, means, priors, settings
from gpytorch.constraints import Interval
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


WITHOUT_CLOSED_FORM = ["without closed form", "linear", "one point"]


@pytest.mark.parametrize("case", CASES)
def test_step_matches_upstream(case: str) -> None:
    mll = CASES[case]()
    leaves = dict(mll.named_parameters())
    off, on = (evaluate(lambda: loss(mll), leaves, flag) for flag in (False, True))
    on.assert_near(off)


@pytest.mark.parametrize("case", [case for case in CASES if case not in WITHOUT_CLOSED_FORM])
def test_closed_form_takes_the_tensor_path(case: str) -> None:
    mll = CASES[case]()
    with use_torch_tensors(), routes(tensors=1):
        loss(mll)
    with use_torch_tensors(False), routes():
        loss(mll)


@pytest.mark.parametrize("case", ["rbf ard", "fixed noise", "batch"])
def test_second_derivatives_match_differences(case: str) -> None:
    mll = CASES[case]()
    parameters = list(mll.parameters())

    def grads(create_graph: bool) -> Tensor:
        with use_torch_tensors():
            return torch.cat(
                [g.view(-1) for g in torch.autograd.grad(loss(mll).sum(), parameters, create_graph=create_graph)]
            )

    flat = grads(create_graph=True)
    rows = [torch.autograd.grad(each, parameters, retain_graph=True, allow_unused=True) for each in flat]
    hessian = torch.stack([torch.cat([row.view(-1) for row in each]) for each in rows])
    columns, step = [], 1e-5
    for parameter in parameters:
        for i in range(parameter.numel()):
            ends = []
            for sign in (1, -2):
                with torch.no_grad():
                    parameter.view(-1)[i] += sign * step
                ends.append(grads(create_graph=False))
            with torch.no_grad():
                parameter.view(-1)[i] += step
            columns.append((ends[0] - ends[1]) / (2 * step))
    assert_near(hessian, torch.stack(columns, -1), rtol=1e-7)


@pytest.mark.parametrize("tries", [1, 2, 3])
def test_jitter_its_warnings_and_its_limit_are_upstreams(tries: int) -> None:
    likelihood = likelihoods.GaussianLikelihood(noise_constraint=Interval(-2.0, 2.0))
    mll = leave_one_out(k.RBFKernel(), inputs(10), likelihood=likelihood)
    likelihood.noise = -0.05  # no sound model has it: the matrix is not positive definite
    outcomes = []
    for flag in (False, True):
        with (
            warnings.catch_warnings(record=True) as caught,
            settings.cholesky_jitter(double_value=0.01),
            settings.cholesky_max_tries(tries),
        ):
            warnings.simplefilter("always")
            try:
                value = evaluate(lambda: loss(mll), dict(mll.named_parameters()), flag)
            except NotPSDError as error:
                value = str(error)
        outcomes.append((value, [str(warning.message) for warning in caught]))
    (expected, expected_warnings), (actual, actual_warnings) = outcomes
    assert actual_warnings == expected_warnings
    assert len(actual_warnings) == min(tries, 2)
    if tries == 1:
        assert actual == expected
    else:
        actual.assert_near(expected, rtol=1e-7)


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
