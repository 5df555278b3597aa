"""`gpytorch.comparison.compare`: what it reports, and that it leaves everything as it was."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable

import pytest
import torch
from both_ways import GP, evaluate, exact_gp, inputs, loss, targets
from torch import Tensor

from gpytorch import dense, kernels, models
from gpytorch.closed_form import covariance
from gpytorch.comparison import Comparison, compare
from gpytorch.distributions import MultivariateNormal
from gpytorch.likelihoods import FixedNoiseGaussianLikelihood, GaussianLikelihood, HadamardGaussianLikelihood
from gpytorch.mlls import ExactMarginalLogLikelihood, LeaveOneOutPseudoLikelihood, SumMarginalLogLikelihood
from gpytorch.models.cholesky_factor import CholeskyFactor
from gpytorch.models.dense_prediction_strategy import DensePredictionStrategy
from gpytorch.settings import use_torch_tensors

N = 10
GRADS = [
    "grad of likelihood.noise_covar.raw_noise",
    "grad of model.mean_module.raw_constant",
    "grad of model.covar_module.raw_outputscale",
    "grad of model.covar_module.base_kernel.raw_lengthscale",
]
POSTERIOR = ["posterior mean", "posterior variance", "posterior covariance"]


def a_gp(kernel: type[kernels.Kernel] = kernels.RBFKernel, **options) -> ExactMarginalLogLikelihood:
    return exact_gp(kernels.ScaleKernel(kernel()), inputs(N), **options)


def compare_all(mll: ExactMarginalLogLikelihood) -> Comparison:
    return compare(mll.model, mll.model.train_inputs[0], mll.model.train_targets, mll, inputs(5, seed=3))


def differing(found: Comparison, rtol: float = 1e-8) -> set[str]:
    return {each.name for each in found.differences if each.relative > rtol}


@pytest.mark.parametrize("options", [{}, {"mll": LeaveOneOutPseudoLikelihood}], ids=["exact", "leave one out"])
def test_every_quantity_is_compared_and_agrees(options: dict) -> None:
    found = compare_all(a_gp(**options))
    assert [each.name for each in found.differences] == ["loss", *GRADS, *POSTERIOR]
    assert differing(found) == set()
    assert all(each.size > 0 for each in found.differences)
    assert found.decisions == (f"tensors: {covariance.CLOSED_FORM}",)


def test_size_is_that_of_the_quantity_itself() -> None:
    mll = a_gp()
    expected = evaluate(lambda: loss(mll), dict(mll.named_parameters()), flag=False)
    sizes = {each.name: each.size for each in compare_all(mll).differences}
    assert sizes["loss"] == expected.value.abs().item()
    for name in GRADS:
        assert sizes[name] == expected.grads[name.removeprefix("grad of ")].abs().max().item()


def wrong_log_prob(factor: float) -> Callable:
    right = covariance.ClosedForm.log_prob
    return lambda self, *args: factor * right(self, *args)


def test_wrong_loss_is_reported_by_its_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(covariance.ClosedForm, "log_prob", wrong_log_prob(1 + 1e-3))
    found = compare_all(a_gp())
    assert differing(found) == {"loss", *GRADS}
    for each in found.differences[: 1 + len(GRADS)]:
        assert each.relative == pytest.approx(1e-3, rel=1e-6)
        assert each.absolute == pytest.approx(1e-3 * each.size, rel=1e-6)


def test_wrong_posterior_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    right = DensePredictionStrategy.factor
    monkeypatch.setattr(
        DensePredictionStrategy, "factor", lambda self, *args: CholeskyFactor(right(self, *args).tensor * (1 + 1e-3))
    )
    assert differing(compare_all(a_gp())) == set(POSTERIOR)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_number_that_only_one_way_has_is_an_infinite_difference(value: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(covariance.ClosedForm, "log_prob", wrong_log_prob(value))
    assert compare_all(a_gp()).differences[0].absolute == math.inf


def test_nan_both_ways_is_no_difference() -> None:
    mll = a_gp()
    mll.model.train_targets[2] = float("nan")
    loss_found = compare_all(mll).differences[0]
    assert (loss_found.absolute, loss_found.relative) == (0.0, 0.0)


def test_structured_covariance_is_said_to_stay_upstream_and_does_not_differ_at_all() -> None:
    found = compare_all(a_gp(kernels.LinearKernel, likelihood=GaussianLikelihood()))
    assert all(decision.startswith("upstream: ") for decision in found.decisions)
    assert "LowRankRootLinearOperator has structure" in found.decisions[0]
    assert {each.absolute for each in found.differences} == {0.0}


def test_printed_it_is_a_table_of_one_line_a_quantity() -> None:
    found = compare_all(a_gp())
    lines = str(found).splitlines()
    assert lines[:2] == [*found.decisions, ""]
    assert lines[2].split() == ["size", "absolute", "relative"]
    for line, difference in zip(lines[3:], found.differences, strict=True):
        assert line.startswith(difference.name)
        assert float(line.split()[-1]) == pytest.approx(difference.relative, rel=0.1)
    assert len({len(line) for line in lines[2:]}) == 1


def test_nothing_of_the_model_changes(caplog: pytest.LogCaptureFixture) -> None:
    mll = a_gp()
    model, x = mll.model, inputs(5, seed=3)
    loss(mll).backward()
    mll.eval()
    mll.likelihood.train()
    with use_torch_tensors():
        before = model(x).mean  # with a graph: such a cache cannot be copied
    strategy, random = model.prediction_strategy, torch.get_rng_state()
    grads = {name: (parameter.grad, parameter.grad.clone()) for name, parameter in mll.named_parameters()}
    modes = {name: module.training for name, module in mll.named_modules()}
    logger = dense.logger.level, dense.logger.propagate, list(dense.logger.handlers)
    with caplog.at_level(logging.DEBUG):
        compare_all(mll)
    assert not caplog.records
    assert (dense.logger.level, dense.logger.propagate, list(dense.logger.handlers)) == logger
    assert model.prediction_strategy is strategy
    assert {name: module.training for name, module in mll.named_modules()} == modes
    assert torch.equal(torch.get_rng_state(), random)
    for name, parameter in mll.named_parameters():
        grad, value = grads[name]
        assert parameter.grad is grad
        assert torch.equal(grad, value)
    with use_torch_tensors():
        assert torch.equal(model(x).mean, before)


def test_both_ways_are_computed_whatever_the_flag_is() -> None:
    mll = a_gp()
    with use_torch_tensors(False):
        expected = compare_all(mll)
    with use_torch_tensors(), torch.no_grad():
        assert compare_all(mll) == expected


class TwoInputs(GP):
    """A model of several inputs."""

    def forward(self, x: Tensor, z: Tensor) -> MultivariateNormal:
        return MultivariateNormal(self.mean_module(x), self.covar_module(torch.cat([x, z], dim=-1)))


def test_model_of_several_inputs_takes_lists() -> None:
    x = [inputs(N), inputs(N, 1, seed=1)]
    model = TwoInputs(x, targets(x[0]), kernels.RBFKernel(), GaussianLikelihood()).double()
    found = compare(model, x, model.train_targets, test_x=[inputs(4, seed=2), inputs(4, 1, seed=3)])
    assert differing(found) == set()
    assert {each.name for each in found.differences} > set(POSTERIOR)


def test_inputs_of_one_dimension_and_batches_are_taken_as_by_the_model() -> None:
    x = inputs(N, 1).squeeze(-1)
    model = GP(x, x.sin(), kernels.RBFKernel(), GaussianLikelihood()).double()
    assert differing(compare(model, x, x.sin(), test_x=inputs(3, 1, seed=2).squeeze(-1))) == set()
    mll = exact_gp(kernels.RBFKernel(), inputs(N, batch=(2,)))
    assert differing(compare_all(mll)) == set()


def test_covariance_of_many_points_is_left_out() -> None:
    mll = a_gp()
    found = compare(mll.model, mll.model.train_inputs, mll.model.train_targets, test_x=inputs(1001, seed=3))
    assert [each.name for each in found.differences][-2:] == POSTERIOR[:2]


def test_list_of_models_is_compared_model_by_model() -> None:
    parts = [a_gp().model, a_gp(kernels.MaternKernel).model]
    model = models.IndependentModelList(*parts)
    mll = SumMarginalLogLikelihood(model.likelihood, model)
    x, y = [part.train_inputs[0] for part in parts], [part.train_targets for part in parts]
    found = compare(model, x, y, mll, [inputs(5, seed=3)] * 2)
    assert differing(found) == set()
    assert [each.name for each in found.differences] == [
        f"model {i}: {name}" for i in range(2) for name in ["loss", *GRADS, *POSTERIOR]
    ]
    with pytest.raises(ValueError, match=r"train_y must have an entry for each of the 2 models\. Got 1"):
        compare(model, x, y[:1])


def test_botorch_model_is_compared_through_its_transforms() -> None:
    botorch = pytest.importorskip("botorch")
    x = inputs(N, 3)
    y = 5 + targets(x).unsqueeze(-1)
    model = botorch.models.SingleTaskGP(x, y, input_transform=botorch.models.transforms.Normalize(3))
    model.eval()
    transformed = model.train_inputs[0]
    found = compare(model, x, model.train_targets, test_x=inputs(4, 3, seed=2))
    assert {each.name for each in found.differences} > set(POSTERIOR)
    assert differing(found) == set()
    assert model.train_inputs[0] is transformed


TASKS = (torch.arange(N) % 2).unsqueeze(-1)
NOISE = torch.linspace(0.1, 0.5, N, dtype=torch.float64)
AT_THE_CALL: dict[str, tuple[Callable, object, tuple, dict]] = {
    "task indices": (lambda: HadamardGaussianLikelihood(2), TASKS, (TASKS,), {}),
    "task indices in a list": (lambda: HadamardGaussianLikelihood(2), [TASKS], (TASKS,), {}),
    "other fixed noise": (lambda: FixedNoiseGaussianLikelihood(NOISE), {"noise": 2 * NOISE}, (), {"noise": 2 * NOISE}),
    "noise for once": (GaussianLikelihood, {"noise": NOISE}, (), {"noise": NOISE}),
}


@pytest.mark.parametrize("case", AT_THE_CALL)
def test_likelihood_gets_what_it_needs_at_its_call(case: str) -> None:
    likelihood, params, args, kwargs = AT_THE_CALL[case]
    mll = a_gp(likelihood=likelihood())
    model = mll.model
    found = compare(model, model.train_inputs, model.train_targets, mll, params=params)
    assert differing(found) == set()
    with use_torch_tensors(False):
        expected = -mll(model(*model.train_inputs), model.train_targets, *args, **kwargs)
    assert found.differences[0].size == expected.abs().item()
    assert found.decisions == (f"tensors: {covariance.CLOSED_FORM}",)


def test_what_comes_with_the_call_gets_no_gradient() -> None:
    mll, noise = a_gp(), NOISE.clone().requires_grad_()
    compare(mll.model, mll.model.train_inputs, mll.model.train_targets, mll, params={"noise": 2 * noise})
    assert noise.grad is None
    mll.requires_grad_(False)
    found = compare(mll.model, mll.model.train_inputs, mll.model.train_targets, mll, params={"noise": noise})
    assert differing(found) == set()
    assert noise.grad is None


def test_each_model_of_a_list_has_params_of_its_own() -> None:
    model = models.IndependentModelList(a_gp(likelihood=HadamardGaussianLikelihood(2)).model, a_gp().model)
    x, y = [part.train_inputs[0] for part in model.models], [part.train_targets for part in model.models]
    assert differing(compare(model, x, y, params=[TASKS, None])) == set()
    with pytest.raises(ValueError, match=r"params must have an entry for each of the 2 models\. Got 1"):
        compare(model, x, y, params=[TASKS])
    with pytest.raises(TypeError, match="params must be a list of an entry for each model"):
        compare(model, x, y, params={"noise": NOISE})


@pytest.mark.parametrize("fixed", [False, True], ids=["noise of each task", "fixed noise"])
@pytest.mark.parametrize("is_list", [False, True], ids=["model", "list of it"])
def test_botorch_model_of_several_tasks_is_called_as_botorch_fits_it(fixed: bool, is_list: bool) -> None:
    botorch = pytest.importorskip("botorch")
    x = torch.cat([inputs(N), TASKS], dim=-1)
    model = botorch.models.MultiTaskGP(
        x,
        targets(x).unsqueeze(-1),
        task_feature=-1,
        train_Yvar=NOISE.unsqueeze(-1) if fixed else None,
        input_transform=botorch.models.transforms.Normalize(3, indices=[0, 1]),
    )
    mll = ExactMarginalLogLikelihood(model.likelihood, model)
    with use_torch_tensors(False):
        expected = botorch.optim.closures.get_loss_closure(mll)()
    points = torch.cat([inputs(4, seed=2), TASKS[:4]], dim=-1)
    arguments = (model, x, model.train_targets, mll, points)
    if is_list:
        arguments = (botorch.models.ModelListGP(model), *([each] for each in arguments[1:3]), None, [points])
    found = compare(*arguments)
    assert differing(found) == set()
    assert found.differences[0].size == expected.abs().item()
    (decision,) = found.decisions
    assert decision.removeprefix("model 0: ").startswith("tensors: ")


BAD: dict[str, tuple[type[Exception], str, Callable]] = {
    "no exact GP": (TypeError, "must be an ExactGP.*Got Linear", lambda m, x, y: (torch.nn.Linear(1, 1), x, y)),
    "inputs no tensor": (TypeError, "train_x must be a tensor.*Got str", lambda m, x, y: (m.model, "x", y)),
    "inputs in no list": (TypeError, "train_x must be a tensor.*Got list", lambda m, x, y: (m.model, [], y)),
    "targets no tensor": (TypeError, "train_y must be a tensor.*Got list", lambda m, x, y: (m.model, x, y.tolist())),
    "no mll": (TypeError, "mll must be a Marginal.*Got float", lambda m, x, y: (m.model, x, y, 1.0)),
    "mll of another model": (ValueError, "of another model", lambda m, x, y: (a_gp().model, x, y, m)),
    "other shape of inputs": (ValueError, "train_x must be the model's", lambda m, x, y: (m.model, x[:-1], y)),
    "targets as a column": (
        ValueError,
        "train_y must be model.train_targets",
        lambda m, x, y: (m.model, x, y[:, None]),
    ),
    "other dimensions": (ValueError, "test_x must have the dim", lambda m, x, y: (m.model, x, y, m, inputs(3, 5))),
    "params no list": (TypeError, "params must be a tensor.*Got int", lambda m, x, y: (m.model, x, y, m, None, 3)),
    "params a word": (TypeError, "params must be a tensor.*Got str", lambda m, x, y: (m.model, x, y, m, None, "noise")),
    "other inputs": (RuntimeError, "train on the training inputs", lambda m, x, y: (m.model, x + 1, y)),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_argument_is_an_error_that_says_which(case: str) -> None:
    error, text, arguments = BAD[case]
    mll = a_gp()
    with pytest.raises(error, match=text):
        compare(*arguments(mll, mll.model.train_inputs[0], mll.model.train_targets))


def test_model_without_data_is_an_error() -> None:
    model = GP(None, None, kernels.RBFKernel(), GaussianLikelihood())
    with pytest.raises(ValueError, match="no training data"):
        compare(model, inputs(3), torch.zeros(3))
