"""Objects that the overlay saves and stock GPyTorch loads, and the other way round."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path

import pytest
from conftest import Environment

MODEL = """
import gpytorch
import torch


class Model(gpytorch.models.ExactGP):
    def __init__(self, x, y, likelihood):
        super().__init__(x, y, likelihood)
        self.mean_module = gpytorch.means.ConstantMean()
        self.covar_module = gpytorch.kernels.ScaleKernel(gpytorch.kernels.RBFKernel(ard_num_dims=2))

    def forward(self, x):
        return gpytorch.distributions.MultivariateNormal(self.mean_module(x), self.covar_module(x))


def train():
    torch.manual_seed(0)
    x = torch.rand(20, 2, dtype=torch.float64)
    y = x.sin().sum(-1) + 0.1 * torch.randn(20, dtype=torch.float64)
    model = Model(x, y, gpytorch.likelihoods.GaussianLikelihood()).double()
    loss_of = gpytorch.mlls.ExactMarginalLogLikelihood(model.likelihood, model)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    for _ in range(5):
        optimizer.zero_grad()
        loss = -loss_of(model(x), y)
        loss.backward()
        optimizer.step()
    return model.eval()


def predict(model):
    prediction = model.likelihood(model(torch.linspace(0, 1, 6, dtype=torch.float64).view(3, 2)))
    return prediction, [*prediction.mean.tolist(), *prediction.covariance_matrix.flatten().tolist()]
"""
SAVE = """
import copy, json, pickle
import torch, model
fitted = model.train()
numbers = model.predict(fitted)[1]
assert model.predict(copy.deepcopy(fitted))[1] == numbers
other = model.train()
with torch.no_grad():  # a prediction with a graph behind it can be neither copied nor saved
    prediction = model.predict(other)[0]
torch.save(fitted, "model.pt")
torch.save(fitted.state_dict(), "state.pt")
with open("objects.pkl", "wb") as file:
    pickle.dump((fitted, prediction, copy.deepcopy(prediction).log_prob), file)
print(json.dumps([numbers, prediction.log_prob(prediction.mean).item()]))
"""
LOAD = """
import json, pickle
import gpytorch, torch, model
saved = torch.load("model.pt", weights_only=False)
state = torch.load("state.pt")
with open("objects.pkl", "rb") as file:
    pickled, prediction, log_prob = pickle.load(file)
fresh = model.train()
with torch.no_grad():
    for parameter in fresh.parameters():
        parameter.zero_()
fresh.load_state_dict(state)
assert type(saved) is type(pickled) is model.Model
assert isinstance(saved.likelihood, gpytorch.likelihoods.GaussianLikelihood)
assert type(prediction) is gpytorch.distributions.MultivariateNormal
assert type(prediction).__module__ == "gpytorch.distributions.multivariate_normal"
assert prediction.log_prob(prediction.mean) == log_prob(prediction.mean)
loaded = [model.predict(m)[1] for m in (saved, pickled, fresh)]
print(json.dumps([loaded, prediction.log_prob(prediction.mean).item()]))
"""
SIDES = {"stock": {}, "overlay, flag off": {}, "overlay, flag on": {"GPYTORCH_USE_TORCH_TENSORS": "1"}}
EXCHANGES = [pair for pair in product(SIDES, SIDES) if "overlay" in "".join(pair) and pair[0] != pair[1]]


@pytest.fixture(scope="module")
def saved(stock: Environment, overlaid: Environment, tmp_path_factory: pytest.TempPathFactory) -> dict:
    """Per side, the folder of what it saved and what it predicted."""
    sides = {}
    for side, variables in SIDES.items():
        folder = tmp_path_factory.mktemp("saved")
        (folder / "model.py").write_text(MODEL)
        environment = stock if side == "stock" else overlaid
        sides[side] = folder, json.loads(environment.run(SAVE, folder, **variables))
    return sides


@pytest.mark.parametrize(("saver", "loader"), EXCHANGES)
def test_what_one_saves_the_other_loads(
    saved: dict[str, tuple[Path, list]], stock: Environment, overlaid: Environment, saver: str, loader: str
) -> None:
    folder, (numbers, log_prob) = saved[saver]
    environment = stock if loader == "stock" else overlaid
    loaded, loaded_log_prob = json.loads(environment.run(LOAD, folder, **SIDES[loader]))
    close = {"rel": 1e-8, "abs": 1e-10} if "overlay, flag on" in (saver, loader) else {"rel": 0, "abs": 0}
    for predicted in loaded:
        assert predicted == pytest.approx(numbers, **close)
    assert loaded_log_prob == pytest.approx(log_prob, **close)


def test_with_the_flag_off_every_number_is_that_of_stock(saved: dict[str, tuple[Path, list]]) -> None:
    assert saved["overlay, flag off"][1] == saved["stock"][1]
