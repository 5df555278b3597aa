"""Matrices that a kernel's own `forward` evaluates, alone and among closed forms: against upstream's."""

from __future__ import annotations

import logging

import pytest
import torch
from both_ways import assert_near, compare_step, exact_gp, goes_by_call, inputs, loss, routes
from kernels_of_all_kinds import DENSE, OfAUser, WithNetwork, points
from linear_operator.operators import DiagLinearOperator
from torch import Tensor

from gpytorch import kernels as k
from gpytorch.closed_form import matrix as kernel_matrix
from gpytorch.functions import kernel_log_prob
from gpytorch.kernels import Kernel
from gpytorch.mlls import LeaveOneOutPseudoLikelihood, MarginalLogLikelihood
from gpytorch.settings import use_torch_tensors

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
UNBATCHED = {"hamming", "symmetrized KL", "linear truncated fidelity", "separate contexts", "embedded contexts"}
NONE = torch.Size([])


def gp(case: str, batch: tuple = (), n: int = 11, **kwargs) -> MarginalLogLikelihood:
    make, x, _ = DENSE[case]
    kernel = make(torch.Size(batch))
    for module in kernel.modules():
        getattr(module, "_priors", {}).clear()  # one of BoTorch's is of a parameter that may be off its support
    return exact_gp(kernel, x(n, batch), **kwargs)


@pytest.mark.parametrize("case", DENSE)
def test_step_matches_upstream_for_the_reason_that_is_logged(case: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, logger="gpytorch.dense"):
        compare_step(gp(case))
    (message,) = (record.getMessage() for record in caplog.records)
    assert message.startswith(f"tensors: {DENSE[case][2]}")


@pytest.mark.parametrize("case", [case for case in DENSE if case not in UNBATCHED])
def test_step_of_a_batch_matches_upstream(case: str) -> None:
    compare_step(gp(case, (2,)))


@pytest.mark.parametrize("case", DENSE)
def test_posterior_matches_upstream(case: str) -> None:
    mll, found = gp(case).eval(), []
    x = DENSE[case][1](5, seed=3)
    # A kernel that evaluates at once leaves upstream nothing to ask for a strategy.
    route = {} if case == "product structure" else {"tensors": 1}
    for flag, taken in ((False, {}), (True, route)):
        mll.model.prediction_strategy = None
        with use_torch_tensors(flag), routes(**taken), torch.no_grad():
            posterior = mll.model(x)
            found.append((posterior.mean, posterior.variance, posterior.covariance_matrix))
    for actual, expected in zip(found[1], found[0], strict=True):
        assert_near(actual, expected)


@pytest.mark.parametrize("case", ["polynomial", "mixed", "a user's and matern", "with a network"])
def test_large_matrix_in_blocks_of_rows_matches_upstream(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(kernel_log_prob._AT_ONCE, "cpu", 0)
    monkeypatch.setitem(kernel_matrix._ELEMENTS, "cpu", (100, 40))
    monkeypatch.setattr(kernel_matrix, "_LEAST_ROWS", 4)
    compare_step(gp(case, n=20))


@pytest.mark.parametrize("case", ["polynomial", "mixed", "with a network, times rbf"])
def test_leave_one_out_matches_upstream(case: str) -> None:
    compare_step(gp(case, mll=LeaveOneOutPseudoLikelihood))


@pytest.mark.parametrize("case", ["matern and linear", "a user's and matern", "with a network"])
def test_gradients_of_the_inputs_match_upstream(case: str) -> None:
    x = points(9).requires_grad_()
    compare_step(exact_gp(DENSE[case][0](NONE), x, y=points(9, seed=1).sum(-1)), leaves={"x": x})


@pytest.mark.parametrize("case", ["polynomial", "matern and linear", "a user's and matern", "with a network"])
def test_second_derivatives_match_upstream(case: str) -> None:
    mll, found = gp(case), []
    parameters = list(mll.parameters())
    for flag in (False, True):
        with use_torch_tensors(flag):
            grads = torch.autograd.grad(loss(mll), parameters, create_graph=True)
            found.append(torch.autograd.grad(sum(grad.square().sum() for grad in grads), parameters))
    for actual, expected in zip(found[1], found[0], strict=True):
        assert_near(actual, expected, rtol=1e-7, atol=1e-10)


@goes_by_call
@pytest.mark.parametrize("case", ["a user's", "a user's and matern"])
def test_compiled_step_is_one_graph(case: str) -> None:
    mll = gp(case)
    with use_torch_tensors():
        expected = loss(mll)
        torch._dynamo.reset()
        actual = torch.compile(lambda: loss(mll), fullgraph=True, backend="aot_eager")()
    assert_near(actual.detach(), expected.detach())


class Counting(WithNetwork):
    """Counts how often it is evaluated."""

    calls = 0

    def forward(self, *args, **kwargs) -> Tensor:
        Counting.calls += 1
        return super().forward(*args, **kwargs)


class LowRank(WithNetwork):
    """Counts as well, and keeps its structure."""

    calls = 0

    def forward(self, x1: Tensor, x2: Tensor, diag: bool = False, **params):
        LowRank.calls += 1
        return k.LinearKernel.forward(self, x1, x2, diag=diag)

    variance = torch.ones(1, 1, dtype=torch.float64)


@pytest.mark.parametrize(
    ("kernel", "counted", "route"),
    [
        (Counting, Counting, "tensors"),
        (lambda: k.ScaleKernel(Counting()), Counting, "tensors"),
        (lambda: k.RBFKernel() + Counting(), Counting, "tensors"),
        (LowRank, LowRank, "upstream"),
        (lambda: k.ScaleKernel(LowRank()), LowRank, "upstream"),
        (lambda: k.RBFKernel() + LowRank(), LowRank, "tensors"),
    ],
)
def test_kernel_is_evaluated_once_a_step(kernel, counted: type[Kernel], route: str) -> None:
    mll = exact_gp(kernel(), points(9))
    counted.calls = 0
    with use_torch_tensors(), routes(**{route: 1}):
        loss(mll).sum().backward()
    assert counted.calls == 1


def test_kernel_of_a_diagonal_is_added_as_upstream_adds_it() -> None:
    class White(Kernel):
        has_lengthscale = True

        def forward(self, x1: Tensor, x2: Tensor, diag: bool = False, **params):
            variance = self.lengthscale.view(1).expand(x1.size(-2))
            return variance if diag else DiagLinearOperator(variance)

    compare_step(exact_gp(k.RBFKernel() + White(), points(9)))
    compare_step(exact_gp(k.LinearKernel() + White(), points(9)), route="upstream")


def test_argument_of_the_kernel_reaches_its_forward() -> None:
    class Shifted(OfAUser):
        def forward(self, x1: Tensor, x2: Tensor, shift: float = 0.0, **params) -> Tensor:
            return super().forward(x1, x2, **params) + shift

    mll = exact_gp(Shifted(), points(9))
    forward = mll.model.forward

    def with_shift(x: Tensor):
        prior = forward(x)
        return type(prior)(prior.mean, mll.model.covar_module(x, shift=0.5))

    mll.model.forward = with_shift
    compare_step(mll)


def test_error_of_a_kernel_is_its_own() -> None:
    said = []
    for flag in (False, True):
        kernel = k.RBFKernel() + k.PolynomialKernel(2, ard_num_dims=3)
        with use_torch_tensors(flag), pytest.raises(RuntimeError) as raised:
            loss(exact_gp(kernel, inputs(7, 2)))
        said.append(str(raised.value))
    assert said[0] == said[1]
