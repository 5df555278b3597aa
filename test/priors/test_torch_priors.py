"""The log normal prior in one formula, against upstream's."""

from __future__ import annotations

import math

import pytest
import torch
from both_ways import assert_near, evaluate, inputs
from torch import Tensor

from gpytorch.priors import LogNormalPrior
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


@pytest.mark.parametrize("case", ["scalar", "batch", "unvalidated"])
def test_density_under_vmap_matches_upstream(case: str) -> None:
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
