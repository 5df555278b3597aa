"""The log normal prior in one formula, against upstream's."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

import pytest
import torch
from both_ways import assert_near, evaluate, inputs, targets
from torch import Tensor

from gpytorch.likelihoods import GaussianLikelihood
from gpytorch.mlls import ExactMarginalLogLikelihood
from gpytorch.models import ExactGP
from gpytorch.priors import LogNormalPrior, Prior
from gpytorch.settings import use_torch_tensors

PRIORS = {
    "scalar": lambda: LogNormalPrior(0.3, 1.7, validate_args=True),
    "of another dtype than its value": lambda: LogNormalPrior(torch.tensor(0.3), torch.tensor(1.7)),
    "batch": lambda: LogNormalPrior(torch.tensor([0.3, -1.0]), torch.tensor([1.7, 0.5]), validate_args=True),
    "transform": lambda: LogNormalPrior(0.3, 1.7, validate_args=True, transform=torch.exp),
    "unvalidated": lambda: LogNormalPrior(0.3, 1.7, validate_args=False),
}


def value(*entries: float) -> Tensor:
    return torch.tensor(entries, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("case", PRIORS)
def test_density_and_gradient_match_upstream(case: str) -> None:
    prior = PRIORS[case]()
    x = value(0.2, 3.0)
    expected, actual = (evaluate(lambda: prior.log_prob(x), {"x": x}, flag) for flag in (False, True))
    actual.assert_near(expected)


class Model(ExactGP):
    """A model whose loss has the terms of some priors."""

    def __init__(self, priors: Sequence[Prior], values: Sequence[Tensor]) -> None:
        x = inputs(6)
        super().__init__(x, targets(x), GaussianLikelihood())
        for i, (prior, value) in enumerate(zip(priors, values, strict=True)):
            self.register_prior(f"prior{i}", prior, partial(self.take, value))

    @staticmethod
    def take(value: Tensor, module: torch.nn.Module) -> Tensor:
        """Return the value, whatever the module."""
        return value


def terms_of_loss(priors: Sequence[Prior], values: Sequence[Tensor]) -> Tensor:
    """Return what the priors add to a model's loss."""
    model = Model(priors, values)
    mll = ExactMarginalLogLikelihood(model.likelihood, model)
    return mll._add_other_terms(torch.zeros((), dtype=torch.float64), ())


@pytest.mark.parametrize("cases", [[case] for case in PRIORS] + [list(PRIORS)], ids=str)
def test_terms_of_a_loss_and_their_derivatives_match_upstream(cases: list[str]) -> None:
    cotangents = inputs(3, 1)[:, 0]
    results = []
    for flag in (False, True):
        with use_torch_tensors(flag):
            values = [value(0.2 + i, 3.0 - i / 4) for i in range(len(cases))]
            term = terms_of_loss([PRIORS[case]() for case in cases], values)
            batched = torch.autograd.grad(term, values, cotangents, is_grads_batched=True, retain_graph=True)
            slopes = torch.autograd.grad(term, values, create_graph=True)
            curvature = torch.autograd.grad(sum(slope.square().sum() for slope in slopes), values)
            last_slopes = torch.autograd.grad(terms_of_loss([PRIORS[case]() for case in cases], values), values)
        results.append([term, *batched, *slopes, *curvature, *last_slopes])
    for expected, actual in zip(*results, strict=True):
        assert actual.shape == expected.shape and actual.dtype is expected.dtype
        assert_near(actual, expected, rtol=1e-9)


@pytest.mark.parametrize("case", PRIORS)
def test_second_derivative_matches_upstream(case: str) -> None:
    prior = PRIORS[case]()
    results = []
    for flag in (False, True):
        with use_torch_tensors(flag):
            x = value(0.2, 3.0)
            (slope,) = torch.autograd.grad(prior.log_prob(x).sum(), x, create_graph=True)
            results.append(torch.autograd.grad(slope.square().sum(), x)[0])
    assert_near(results[1], results[0], rtol=1e-9)


@pytest.mark.parametrize("of_loss", [False, True])
def test_prior_whose_parameters_are_learned_matches_upstream(of_loss: bool) -> None:
    scale = torch.tensor(1.7, dtype=torch.float64, requires_grad=True)
    prior, x = LogNormalPrior(0.3, scale), value(0.2, 3.0)

    def density() -> Tensor:
        return terms_of_loss([prior], [x]) if of_loss else prior.log_prob(x)

    expected, actual = (evaluate(density, {"x": x, "scale": scale}, flag) for flag in (False, True))
    actual.assert_near(expected)


@pytest.mark.parametrize("flag", [False, True])
def test_value_changed_in_place_before_the_backward_raises(flag: bool) -> None:
    x = value(0.2, 3.0)
    with use_torch_tensors(flag):
        term = terms_of_loss([LogNormalPrior(0.3, 1.7)], [x])
        with torch.no_grad():
            x.mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            term.backward()


@pytest.mark.parametrize("flag", [False, True])
def test_loss_of_a_value_outside_the_support_raises(flag: bool) -> None:
    with use_torch_tensors(flag), pytest.raises(ValueError, match="within the support"):
        terms_of_loss([LogNormalPrior(0.3, 1.7, validate_args=True)], [value(-1.0, 2.0)])


def test_prior_with_a_density_of_its_own_is_asked_for_it() -> None:
    class Halved(LogNormalPrior):
        def log_prob(self, x: Tensor) -> Tensor:
            return super().log_prob(x) / 2

    patched = LogNormalPrior(0.3, 1.7)
    patched.log_prob = lambda x: x.square()
    x = value(0.2, 3.0)
    with use_torch_tensors():
        actual = terms_of_loss([Halved(0.3, 1.7), patched], [x, x])
    assert_near(actual, LogNormalPrior(0.3, 1.7).log_prob(x).sum() / 2 + x.square().sum())


def validates_under_vmap() -> bool:
    """Whether torch's own distributions validate what they are given under `torch.vmap` (from torch 2.5 on)."""
    with use_torch_tensors(False):
        try:
            torch.vmap(torch.distributions.LogNormal(0.3, 1.7, validate_args=True).log_prob)(torch.ones(2))
        except RuntimeError:
            return False
    return True


@pytest.mark.parametrize("case", ["scalar", "batch", "unvalidated"])
def test_density_under_vmap_matches_upstream(case: str) -> None:
    if case != "unvalidated" and not validates_under_vmap():
        pytest.skip("this torch's own distributions raise under torch.vmap")
    prior, x = PRIORS[case](), inputs(3, 2) + 0.1
    with use_torch_tensors(False):
        expected = torch.vmap(prior.log_prob)(x)
    with use_torch_tensors():
        assert_near(torch.vmap(prior.log_prob)(x), expected, rtol=1e-6)


BAD_VALUES = {
    "negative": value(-1.0, 2.0),
    "zero": value(0.0, 2.0),
    "not a number": value(math.nan, 2.0),
    "of another shape": value(1.0, 2.0, 3.0),
    "no tensor": 2.0,
}


@pytest.mark.parametrize("case", PRIORS)
@pytest.mark.parametrize("bad", BAD_VALUES)
def test_value_outside_the_support_is_upstreams_error(case: str, bad: str) -> None:
    outcomes = []
    for flag in (False, True):
        with use_torch_tensors(flag):
            try:
                outcomes.append(PRIORS[case]().log_prob(BAD_VALUES[bad]).isnan().tolist())
            except Exception as error:
                outcomes.append((type(error), str(error)))
    assert outcomes[0] == outcomes[1]
    if case == "scalar" and bad != "of another shape":
        assert outcomes[0][0] is ValueError
