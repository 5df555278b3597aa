"""Rounds of Bayesian optimization with BoTorch as it comes: the flag changes no decision that is not a tie.

From one round to the next optimizers amplify rounding, so each round starts both ways from the same data.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from botorch.acquisition import LogExpectedImprovement
from botorch.fit import fit_gpytorch_mll
from botorch.models import SingleTaskGP
from botorch.optim import optimize_acqf
from botorch.test_functions import Branin, Hartmann, SyntheticTestFunction
from torch import Tensor

from gpytorch import dense
from gpytorch.mlls import ExactMarginalLogLikelihood
from gpytorch.settings import use_torch_tensors

ROUNDS = 4


@dataclass
class Round:
    """What a round of Bayesian optimization decides, and by what."""

    loss: float
    hyperparameters: Tensor
    log_ei: LogExpectedImprovement
    candidate: Tensor


def play(x: Tensor, y: Tensor, seed: int, flag: bool) -> Round:
    torch.manual_seed(seed)
    with use_torch_tensors(flag):
        model = SingleTaskGP(x, y)
        mll = fit_gpytorch_mll(ExactMarginalLogLikelihood(model.likelihood, model)).train()
        loss = -mll(model(*model.train_inputs), model.train_targets)
        log_ei = LogExpectedImprovement(model.eval(), best_f=y.max())
        bounds = torch.stack([torch.zeros_like(x[0]), torch.ones_like(x[0])])
        candidate, _ = optimize_acqf(log_ei, bounds, q=1, num_restarts=4, raw_samples=32)
    parameters = torch.cat([parameter.detach().reshape(-1) for parameter in model.parameters()])
    return Round(loss.item(), parameters, log_ei, candidate)


@pytest.mark.filterwarnings("ignore")  # BoTorch's advice on scaling
@pytest.mark.parametrize(
    # Hartmann's function of six variables leaves some lengthscales flat: the fit ends where the loss no longer falls.
    ("function", "tolerance"),
    [(Branin(negate=True), 1e-4), (Hartmann(negate=True), 3e-2)],
    ids=["Branin", "Hartmann-6"],
)
def test_rounds_from_the_same_data_find_the_same_point(function: SyntheticTestFunction, tolerance: float) -> None:
    function = function.double()
    low, high = function.bounds
    x = torch.quasirandom.SobolEngine(function.dim, scramble=True, seed=0).draw(2 * function.dim, dtype=torch.float64)
    y = function(low + (high - low) * x).unsqueeze(-1)
    before = dense.routes.copy()
    for seed in range(ROUNDS):
        off, on = (play(x, y, seed, flag) for flag in (False, True))
        assert on.loss == pytest.approx(off.loss, abs=1e-5)
        torch.testing.assert_close(on.hyperparameters, off.hyperparameters, rtol=tolerance, atol=tolerance)
        with torch.no_grad():
            worth = off.log_ei(torch.stack([off.candidate, on.candidate]))
        assert worth[1].item() == pytest.approx(worth[0].item(), abs=1e-4)
        x = torch.cat([x, off.candidate])
        y = torch.cat([y, function(low + (high - low) * off.candidate).unsqueeze(-1)])
    assert dense.routes["tensors"] > before["tensors"]
    assert dense.routes["upstream"] == before["upstream"]


@pytest.mark.filterwarnings("ignore")
def test_loops_of_their_own_find_the_same_points() -> None:
    function = Branin(negate=True).double()
    low, high = function.bounds
    found = []
    for flag in (False, True):
        x = torch.quasirandom.SobolEngine(2, scramble=True, seed=1).draw(6, dtype=torch.float64)
        y = function(low + (high - low) * x).unsqueeze(-1)
        for seed in range(ROUNDS):
            candidate = play(x, y, seed, flag).candidate
            x = torch.cat([x, candidate])
            y = torch.cat([y, function(low + (high - low) * candidate).unsqueeze(-1)])
        found.append((x, y.max()))
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-4)
