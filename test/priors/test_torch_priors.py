"""The log normal prior in one formula, against upstream's."""

from __future__ import annotations

import math

import pytest
import torch
from both_ways import evaluate
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


@pytest.mark.parametrize("case", PRIORS)
@pytest.mark.parametrize("entries", [(-1.0, 2.0), (0.0, 2.0), (math.nan, 2.0), (1.0, 2.0, 3.0)], ids=str)
def test_value_outside_the_support_is_upstreams_error(case: str, entries: tuple[float, ...]) -> None:
    outcomes = []
    for flag in (False, True):
        with use_torch_tensors(flag):
            try:
                outcomes.append(PRIORS[case]().log_prob(value(*entries)).isnan().tolist())
            except (ValueError, RuntimeError) as error:
                outcomes.append((type(error), str(error)))
    assert outcomes[0] == outcomes[1]
    if case == "scalar" and len(entries) == 2:
        assert outcomes[0][0] is ValueError
