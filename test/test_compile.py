"""`torch.compile` of a training step in one graph, and `torch.jit.trace` of a posterior: the same numbers as eager."""

from __future__ import annotations

import shutil
import warnings
from collections import Counter
from collections.abc import Callable, Iterator

import pytest
import torch
from both_ways import Result, assert_near, evaluate, exact_gp, goes_by_call, inputs, loss, routes
from linear_operator.settings import trace_mode as unchecked
from torch import Tensor

from gpytorch import dense, means, settings
from gpytorch import kernels as k
from gpytorch.constraints import Interval
from gpytorch.likelihoods import FixedNoiseGaussianLikelihood, GaussianLikelihood
from gpytorch.mlls import ExactMarginalLogLikelihood, LeaveOneOutPseudoLikelihood
from gpytorch.priors import GammaPrior, LogNormalPrior
from gpytorch.settings import use_torch_tensors

N = 8
BATCH = torch.Size([2])


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch's own, of itself
        warnings.simplefilter("ignore", torch.jit.TracerWarning)  # of shapes, which are the same at every call
        yield
    torch._dynamo.reset()


def fixed_noise(**options) -> FixedNoiseGaussianLikelihood:
    return FixedNoiseGaussianLikelihood(torch.linspace(0.1, 0.2, N, dtype=torch.float64), **options)


def with_priors() -> ExactMarginalLogLikelihood:
    kernel = k.ScaleKernel(k.RBFKernel(lengthscale_prior=GammaPrior(2.0, 1.0)), outputscale_prior=GammaPrior(2.0, 1.0))
    return exact_gp(kernel, inputs(N), likelihood=GaussianLikelihood(noise_prior=LogNormalPrior(-4.0, 1.0)))


def batch_of_models() -> ExactMarginalLogLikelihood:
    kernel = k.ScaleKernel(k.RBFKernel(batch_shape=BATCH), batch_shape=BATCH)
    mean, likelihood = means.ConstantMean(batch_shape=BATCH), GaussianLikelihood(batch_shape=BATCH)
    return exact_gp(kernel, inputs(N, batch=BATCH), likelihood=likelihood, mean=mean)


MODELS: dict[str, Callable[[], ExactMarginalLogLikelihood]] = {
    "rbf, ard": lambda: exact_gp(k.ScaleKernel(k.RBFKernel(ard_num_dims=2)), inputs(N)),
    "matern 1/2": lambda: exact_gp(k.MaternKernel(0.5), inputs(N)),
    "matern 5/2, ard": lambda: exact_gp(k.ScaleKernel(k.MaternKernel(2.5, ard_num_dims=2)), inputs(N)),
    "rational quadratic": lambda: exact_gp(k.ScaleKernel(k.RQKernel()), inputs(N)),
    "periodic": lambda: exact_gp(k.ScaleKernel(k.PeriodicKernel()), inputs(N), mean=means.ZeroMean()),
    "sum and product": lambda: exact_gp(
        k.ScaleKernel(k.RBFKernel(active_dims=[0])) * k.MaternKernel(1.5) + k.RBFKernel(), inputs(N)
    ),
    "linear mean": lambda: exact_gp(k.RBFKernel(), inputs(N), mean=means.LinearMean(2)),
    "priors": with_priors,
    "fixed noise": lambda: exact_gp(k.RBFKernel(), inputs(N), likelihood=fixed_noise()),
    "fixed noise and more": lambda: exact_gp(
        k.RBFKernel(), inputs(N), likelihood=fixed_noise(learn_additional_noise=True)
    ),
    "batch of models": batch_of_models,
    "batch of data": lambda: exact_gp(k.ScaleKernel(k.RBFKernel()), inputs(N, batch=BATCH)),
    "one point": lambda: exact_gp(k.ScaleKernel(k.RBFKernel()), inputs(1)),
    "leave one out": lambda: exact_gp(k.ScaleKernel(k.RBFKernel()), inputs(N), mll=LeaveOneOutPseudoLikelihood),
}


def log_prob(mll: ExactMarginalLogLikelihood) -> Tensor:
    """What users write who do without a marginal log likelihood."""
    return mll.likelihood(mll.model(*mll.model.train_inputs)).log_prob(mll.model.train_targets)


def compile_step(step: Callable, mll: ExactMarginalLogLikelihood, backend: str, **options) -> Callable[[], Tensor]:
    return torch.compile(lambda: step(mll), fullgraph=True, backend=backend, **options)


def assert_same_compiled(step: Callable, mll: ExactMarginalLogLikelihood, backend: str) -> Result:
    leaves = dict(mll.named_parameters())
    expected = evaluate(lambda: step(mll), leaves, flag=True)
    before = Counter(dense.routes)
    compiled = compile_step(step, mll, backend)
    actual = evaluate(compiled, leaves, flag=True)
    assert set(dense.routes - before) == {"tensors"}
    with routes():  # a graph was traced once and for all
        actual = evaluate(compiled, leaves, flag=True)
    actual.assert_near(expected, rtol=1e-10, atol=1e-13)
    return actual


@goes_by_call
@pytest.mark.parametrize("case", MODELS)
def test_training_step_is_one_graph_with_the_numbers_of_eager(case: str) -> None:
    assert_same_compiled(loss, MODELS[case](), "aot_eager")


@goes_by_call
@pytest.mark.parametrize("case", ["rbf, ard", "batch of data", "fixed noise"])
def test_log_prob_of_the_marginal_is_one_graph_with_the_numbers_of_eager(case: str) -> None:
    assert_same_compiled(log_prob, MODELS[case](), "aot_eager")


@goes_by_call
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor compiles C++")
def test_inductor_compiles_the_same_graph() -> None:
    assert_same_compiled(loss, MODELS["rbf, ard"](), "inductor")


@goes_by_call
def test_compiled_step_trains_as_the_eager_one() -> None:
    trained = []
    for is_compiled in (False, True):
        mll = MODELS["rbf, ard"]()
        optimizer = torch.optim.Adam(mll.parameters(), lr=0.1)
        step = compile_step(loss, mll, "aot_eager") if is_compiled else lambda mll=mll: loss(mll)
        with use_torch_tensors():
            for _ in range(10):
                optimizer.zero_grad()
                step().backward()
                optimizer.step()
        trained.append(torch.cat([parameter.detach().view(-1) for parameter in mll.parameters()]))
    assert_near(trained[1], trained[0], rtol=1e-10)


@goes_by_call
def test_other_shape_is_an_error_where_the_graph_is_to_stay() -> None:
    mll = MODELS["rbf, ard"]()
    step = torch.compile(lambda x, y: -mll(mll.model(x), y), fullgraph=True, dynamic=False, backend="aot_eager")
    x, y = mll.model.train_inputs[0], mll.model.train_targets
    with use_torch_tensors():
        first = step(x, y)
        with torch.compiler.set_stance("fail_on_recompile"):
            assert torch.equal(step(x, y), first)
            with pytest.raises(RuntimeError, match="recompile"):
                step(x[:-1], y[:-1])


@goes_by_call
def test_hand_written_backward_is_what_is_compiled() -> None:
    """Autograd's own way back through Cholesky would cost four times as much."""
    operators: set[str] = set()

    def look(graph: torch.fx.GraphModule, example: list[Tensor]) -> Callable:
        operators.update(str(node.target) for node in graph.graph.nodes)
        return graph

    mll = MODELS["rbf, ard"]()
    backend = torch._dynamo.backends.common.aot_autograd(fw_compiler=look, bw_compiler=look)
    with use_torch_tensors():
        torch.compile(lambda: loss(mll), fullgraph=True, backend=backend)().backward()
    assert "aten.cholesky_inverse.default" in operators
    assert sum("linalg_cholesky" in each for each in operators) == 1


@pytest.mark.parametrize("step", [loss, log_prob])
def test_flag_off_breaks_the_graph_as_stock_does(step: Callable) -> None:
    mll = MODELS["rbf, ard"]()
    with use_torch_tensors(False), pytest.raises(torch._dynamo.exc.Unsupported):
        compile_step(step, mll, "eager")()


@goes_by_call
def test_kernel_without_closed_form_compiles_in_several_graphs() -> None:
    mll = exact_gp(k.ScaleKernel(k.PiecewisePolynomialKernel(q=2)), inputs(N))
    leaves = dict(mll.named_parameters())
    expected = evaluate(lambda: loss(mll), leaves, flag=True)
    actual = evaluate(torch.compile(lambda: loss(mll), backend="eager"), leaves, flag=True)
    actual.assert_near(expected, rtol=1e-10)
    with use_torch_tensors(), pytest.raises(torch._dynamo.exc.Unsupported):
        compile_step(loss, mll, "eager")()


@goes_by_call
def test_prediction_compiles_in_several_graphs() -> None:
    mll = MODELS["rbf, ard"]().eval()
    x = inputs(5, seed=3)

    def predict() -> Tensor:
        posterior = mll.likelihood(mll.model(x))
        return torch.cat([posterior.mean, posterior.variance])

    expected = evaluate(predict, {}, flag=True)
    mll.train().eval()
    evaluate(torch.compile(predict, backend="eager"), {}, flag=True).assert_near(expected, rtol=1e-10)


def indefinite() -> ExactMarginalLogLikelihood:
    likelihood = GaussianLikelihood(noise_constraint=Interval(-2.0, 2.0))
    mll = exact_gp(k.RBFKernel(), inputs(N), likelihood=likelihood)
    likelihood.noise = -0.5
    return mll


@goes_by_call
def test_matrix_that_needs_jitter_is_an_error_unless_nobody_looks() -> None:
    mll = indefinite()
    with use_torch_tensors(), pytest.raises(torch.linalg.LinAlgError, match="not positive-definite"):
        compile_step(loss, mll, "aot_eager")()
    torch._dynamo.reset()
    with use_torch_tensors(), unchecked():
        compile_step(loss, mll, "aot_eager")()


@goes_by_call
def test_setting_for_debugging_is_as_it_was_after_compiling() -> None:
    mll = MODELS["rbf, ard"]()
    with use_torch_tensors():
        compile_step(loss, mll, "eager")()
    assert settings.debug.on()
    with pytest.raises(RuntimeError, match="must train on the training inputs"):
        mll.model(inputs(N, seed=5))


class MeanAndVariance(torch.nn.Module):
    """A posterior as tensors, which is what can be traced."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        posterior = self.model(x)
        return posterior.mean, posterior.variance


@pytest.mark.parametrize("with_grad", [False, True])
@pytest.mark.parametrize(
    "kernel",
    [
        lambda: k.ScaleKernel(k.RBFKernel()),
        lambda: k.ScaleKernel(k.MaternKernel(2.5, ard_num_dims=2)),
        lambda: k.RBFKernel() + k.ScaleKernel(k.PeriodicKernel()),
        lambda: k.PiecewisePolynomialKernel(q=2),
    ],
    ids=["rbf", "matern", "sum", "without closed form"],
)
def test_traced_posterior_predicts_as_upstream_at_any_points(kernel: Callable[[], k.Kernel], with_grad: bool) -> None:
    model = MeanAndVariance(exact_gp(kernel(), inputs(N)).eval().model)
    with use_torch_tensors(), torch.no_grad(), settings.fast_pred_var(), settings.trace_mode(), routes(tensors=1):
        model(inputs(5))
        traced = torch.jit.trace(model, inputs(5))
    model.train().eval()
    for n in (1, 5, 9):
        x = inputs(n, seed=3)
        with use_torch_tensors(False):
            expected = model(x)
        with torch.set_grad_enabled(with_grad):
            actual = traced(x)
        for ours, theirs in zip(actual, expected, strict=True):
            assert_near(ours.detach(), theirs.detach(), rtol=1e-10)
