"""Bad input, failing factorizations, interrupts and a long life: the errors, warnings and states that upstream has."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import re
import threading
import warnings
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from both_ways import (
    assert_leaves_nothing_behind,
    assert_near,
    compare,
    evaluate,
    exact_gp,
    growth_of_process,
    inputs,
    loss,
    routes,
    scatter,
    targets,
)
from linear_operator.utils.errors import NanError, NotPSDError
from linear_operator.utils.warnings import NumericalWarning
from torch import Tensor

from gpytorch import kernels as k
from gpytorch import settings
from gpytorch.constraints import Interval
from gpytorch.likelihoods import FixedNoiseGaussianLikelihood, GaussianLikelihood
from gpytorch.mlls import ExactMarginalLogLikelihood
from gpytorch.settings import use_torch_tensors

N = 10
KERNELS: dict[str, Callable[[], k.Kernel]] = {
    "closed form": lambda: k.ScaleKernel(k.RBFKernel(ard_num_dims=2)),
    "without closed form": lambda: k.ScaleKernel(k.PiecewisePolynomialKernel(q=2)),
    "structured": lambda: k.ScaleKernel(k.LinearKernel()),
}


def step(mll: ExactMarginalLogLikelihood) -> Tensor:
    value = loss(mll)
    value.sum().backward()
    return value.detach()


def outcome(make: Callable[[], ExactMarginalLogLikelihood], flag: bool) -> tuple[object, list[tuple[type, str]]]:
    """Loss and gradients, or the error's type and text; and the warnings on the way."""
    with warnings.catch_warnings(record=True) as caught, use_torch_tensors(flag):
        warnings.simplefilter("always")
        try:
            mll = make()
            result = {"loss": step(mll), **{name: parameter.grad for name, parameter in mll.named_parameters()}}
        except Exception as error:
            result = (type(error), str(error))
    return result, [(warning.category, str(warning.message)) for warning in caught]


def assert_same_outcome(make: Callable[[], ExactMarginalLogLikelihood], rtol: float = 1e-8) -> object:
    expected, expected_warnings = outcome(make, flag=False)
    actual, actual_warnings = outcome(make, flag=True)
    assert actual_warnings == expected_warnings
    if isinstance(expected, tuple):
        assert actual == expected
        return expected[0]
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        if value is None or (name == "loss" and not torch.isfinite(value).all()):
            torch.testing.assert_close(actual[name], value, equal_nan=True)
        elif torch.isfinite(value).all():  # upstream's NaN may be another's zero: of an infinite noise, say
            assert_near(actual[name], value, name, rtol, atol=1e-12)
    return None


def with_bad(value: float, where: str, kernel: str) -> ExactMarginalLogLikelihood:
    x = inputs(N)
    y = targets(x)
    if where == "inputs":
        x[3, 1] = value
    elif where == "targets":
        y[3] = value
    mll = exact_gp(KERNELS[kernel](), x, y)
    with torch.no_grad():
        for name, parameter in mll.named_parameters():
            if where in name:
                parameter.fill_(value)
    return mll


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("where", ["targets", "raw_outputscale", "raw_noise", "raw_constant"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_bad_number_has_the_same_consequence_as_upstream(value: float, where: str, kernel: str) -> None:
    assert_same_outcome(lambda: with_bad(value, where, kernel))


def without_digits(text: str) -> str:
    return re.sub(r"\d+", "", text)


@pytest.mark.parametrize("kernel", ["closed form", "without closed form"])
@pytest.mark.parametrize("where", ["inputs", "raw_lengthscale"])
def test_nan_in_the_covariance_is_upstreams_error(where: str, kernel: str) -> None:
    with settings.debug(False):  # else NaN is not NaN, and these are not the training inputs
        (expected, expected_warnings), (actual, actual_warnings) = (
            outcome(lambda: with_bad(float("nan"), where, kernel), flag) for flag in (False, True)
        )
    assert expected[0] is actual[0] is NanError
    assert without_digits(actual[1]) == without_digits(expected[1])  # the diagonal may be among the NaN or not
    assert actual_warnings == expected_warnings


@pytest.mark.parametrize("kernel", ["closed form", "without closed form"])
def test_infinite_input_is_upstreams_error(kernel: str) -> None:
    kinds = [outcome(lambda: with_bad(float("inf"), "inputs", kernel), flag)[0] for flag in (False, True)]
    assert isinstance(kinds[0], tuple) == isinstance(kinds[1], tuple)
    if isinstance(kinds[0], tuple):
        assert kinds[0][0] is kinds[1][0]


def indefinite(kernel: str, noise: float, batch: tuple[int, ...] = ()) -> ExactMarginalLogLikelihood:
    """A model whose covariance has negative eigenvalues, by a noise that no sound model has."""
    likelihood = GaussianLikelihood(noise_constraint=Interval(-2.0, 2.0))
    mll = exact_gp(KERNELS[kernel](), inputs(N, batch=batch), likelihood=likelihood)
    likelihood.noise = noise
    return mll


@pytest.mark.parametrize("batch", [(), (2,)])
@pytest.mark.parametrize("kernel", ["closed form", "without closed form"])
@pytest.mark.parametrize("tries", [1, 2, 3])
@pytest.mark.parametrize(("noise", "needed"), [(-0.005, 1), (-0.05, 2), (-0.5, 3)])
def test_jitter_its_warnings_and_its_limit_are_upstreams(
    noise: float, needed: int, tries: int, kernel: str, batch: tuple[int, ...]
) -> None:
    with settings.cholesky_jitter(double_value=0.01), settings.cholesky_max_tries(tries):
        kind = assert_same_outcome(lambda: indefinite(kernel, noise, batch), rtol=1e-7)
        _, warned = outcome(lambda: indefinite(kernel, noise, batch), flag=True)
    assert (kind is NotPSDError) == (tries < needed)
    assert [category for category, _ in warned] == [NumericalWarning] * min(needed, tries)


def test_jitter_of_float32_is_that_of_float32() -> None:
    with settings.cholesky_jitter(float_value=0.01, double_value=0.5):
        _, warned = outcome(lambda: indefinite("closed form", -0.005).float(), flag=True)
    assert not warned or "1.0e-02" in warned[0][1]


@pytest.mark.parametrize("kernel", ["closed form", "without closed form"])
def test_repeated_points_without_noise_end_as_upstream(kernel: str) -> None:
    x = torch.cat([inputs(6), inputs(6)])
    noise = torch.full((12,), 1e-4, dtype=torch.float64)
    assert_same_outcome(lambda: exact_gp(KERNELS[kernel](), x, likelihood=FixedNoiseGaussianLikelihood(noise)), 1e-6)


MISMATCHES: dict[str, Callable[[ExactMarginalLogLikelihood], Tensor]] = {
    "shorter targets": lambda mll: mll(mll.model(*mll.model.train_inputs), mll.model.train_targets[:-1]),
    "other inputs while training": lambda mll: mll(mll.model(inputs(N, seed=9)), mll.model.train_targets),
    "not a normal": lambda mll: mll(mll.model.train_targets, mll.model.train_targets),
    "targets of another type": lambda mll: mll(mll.model(*mll.model.train_inputs), mll.model.train_targets.tolist()),
    "targets on another device": lambda mll: mll(
        mll.model(*mll.model.train_inputs), mll.model.train_targets.to("meta")
    ),
}


@pytest.mark.parametrize("kernel", ["closed form", "without closed form"])
@pytest.mark.parametrize("case", MISMATCHES)
def test_mismatch_is_an_error_of_upstreams_type_and_the_model_goes_on(case: str, kernel: str) -> None:
    mll = exact_gp(KERNELS[kernel](), inputs(N))
    with use_torch_tensors():
        expected = step(mll)
    kinds = []
    for flag in (False, True):
        with use_torch_tensors(flag), pytest.raises(Exception) as caught:
            MISMATCHES[case](mll)
        kinds.append(caught.type)
    assert kinds[0] is kinds[1]
    with use_torch_tensors():
        assert torch.equal(step(mll), expected)


@pytest.mark.parametrize("kernel", ["closed form", "without closed form"])
@pytest.mark.parametrize("dtypes", [(torch.float64, torch.float32), (torch.float32, torch.float64)], ids=str)
def test_targets_of_another_precision_are_treated_as_by_upstream(
    kernel: str, dtypes: tuple[torch.dtype, torch.dtype]
) -> None:
    mll = exact_gp(KERNELS[kernel](), inputs(N, dtype=dtypes[0]))
    targets = mll.model.train_targets.to(dtypes[1]).requires_grad_()
    leaves = {**dict(mll.named_parameters()), "targets": targets}
    rounding = {"rtol": 1e-5} if dtypes[0] is torch.float32 else {}

    def loss() -> Tensor:
        with routes(**({"tensors": 1} if use_torch_tensors.on() else {})):
            return mll(mll.model(*mll.model.train_inputs), targets)

    with torch.no_grad():
        values = []
        for flag in (False, True):
            with use_torch_tensors(flag):
                values.append(loss())
    assert values[1].dtype is values[0].dtype is dtypes[0]
    assert_near(values[1], values[0], **rounding)
    off, on = (evaluate(loss, leaves, flag) for flag in (False, True))
    assert on.value.dtype is off.value.dtype is dtypes[0]
    assert_near(on.value, off.value, **rounding)
    for name, grad in off.grads.items():
        assert on.grads[name].dtype is grad.dtype
        assert_near(on.grads[name], grad, name, **({"rtol": 1e-4} if rounding else {}))


def test_targets_may_change_between_forward_and_backward() -> None:
    mll = exact_gp(KERNELS["closed form"](), inputs(N))
    grads = []
    for flag in (False, True):
        targets = mll.model.train_targets.clone()
        with use_torch_tensors(flag), routes(**({"tensors": 1} if flag else {})):
            loss = mll(mll.model(*mll.model.train_inputs), targets)
            targets.zero_()
            grads.append(torch.autograd.grad(loss, list(mll.parameters())))
    for expected, actual in zip(*grads, strict=True):
        assert_near(actual, expected)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, MemoryError])
@pytest.mark.parametrize("moment", ["before", "factorization", "backward"])
def test_exception_leaves_no_flag_and_no_half_written_state(
    error: type[BaseException], moment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    mll = exact_gp(KERNELS["closed form"](), inputs(N))
    before = {name: value.clone() for name, value in mll.state_dict().items()}
    expected = evaluate(lambda: loss(mll), dict(mll.named_parameters()), flag=True)

    def fail(*args, **options):
        raise error("on purpose")

    with monkeypatch.context() as patch, pytest.raises(error, match="on purpose"), use_torch_tensors():
        output = mll.model(*mll.model.train_inputs)
        if moment == "before":
            raise error("on purpose")
        if moment == "factorization":
            patch.setattr(torch.linalg, "cholesky_ex", fail)
        value = mll(output, mll.model.train_targets)
        value.register_hook(fail)
        value.backward()
    assert use_torch_tensors.is_default() or use_torch_tensors.off()
    assert all(torch.equal(value, before[name]) for name, value in mll.state_dict().items())
    evaluate(lambda: loss(mll), dict(mll.named_parameters()), flag=True).assert_equal(expected)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("n", [N, 400])
def test_second_backward_gives_the_same_numbers(kernel: str, n: int) -> None:
    mll = exact_gp(KERNELS[kernel](), inputs(n))
    parameters = list(mll.parameters())
    with use_torch_tensors():
        value = loss(mll)
    grads = [torch.autograd.grad(value, parameters, retain_graph=keep) for keep in (True, True, False)]
    for later in grads[1:]:
        for first, second in zip(grads[0], later, strict=True):
            assert torch.equal(first, second)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(value, parameters)


def test_two_losses_of_one_output_do_not_disturb_each_other() -> None:
    mll = exact_gp(KERNELS["closed form"](), inputs(N))
    with use_torch_tensors():
        output = mll.model(*mll.model.train_inputs)
        losses = [mll(output, mll.model.train_targets), mll(output, 2 * mll.model.train_targets)]
        sum(losses).backward()
    together = [parameter.grad.clone() for parameter in mll.parameters()]
    apart = [torch.zeros_like(each) for each in together]
    for factor in (1, 2):
        mll.zero_grad()
        with use_torch_tensors():
            mll(mll.model(*mll.model.train_inputs), factor * mll.model.train_targets).backward()
        for total, parameter in zip(apart, mll.parameters(), strict=True):
            total += parameter.grad
    for ours, expected in zip(together, apart, strict=True):
        assert_near(ours, expected, rtol=1e-10)


@pytest.mark.parametrize("flag", [False, True])
def test_parameter_changed_between_forward_and_backward_is_an_error(flag: bool) -> None:
    mll = exact_gp(KERNELS["closed form"](), inputs(N))
    with use_torch_tensors(flag):
        value = loss(mll)
    with torch.no_grad():
        mll.model.covar_module.base_kernel.raw_lengthscale.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.backward()


@pytest.mark.alone
@pytest.mark.parametrize("kernel", ["closed form", "without closed form"])
def test_1000_steps_leave_nothing_behind(kernel: str) -> None:
    mll = exact_gp(KERNELS[kernel](), inputs(N))
    optimizer = torch.optim.Adam(mll.parameters(), lr=1e-3)

    def train(steps: int) -> None:
        for _ in range(steps):
            optimizer.zero_grad()
            step(mll)
            optimizer.step()

    with use_torch_tensors():
        assert_leaves_nothing_behind(train, *((5, 200) if kernel == "closed form" else (4, 150)))


@pytest.mark.alone
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="the process's memory is read from /proc")
@pytest.mark.parametrize("kernel", ["closed form", "without closed form"])
def test_steps_do_not_grow_the_process(kernel: str) -> None:
    n = 300
    mll = exact_gp(KERNELS[kernel](), inputs(n))
    with use_torch_tensors():
        assert growth_of_process(lambda: step(mll), 60) < n * n * 8 / 4  # a quarter of one matrix


class Witness:
    """A hook that dies with the node of the graph that it hangs on."""

    def __call__(self, *grads) -> None:
        pass


def watch(node: torch.autograd.graph.Node, witnesses: list[weakref.ref]) -> None:
    witness = Witness()
    node.register_hook(witness)
    witnesses.append(weakref.ref(witness))
    for child, _ in node.next_functions:
        if child is not None:
            watch(child, witnesses)


@pytest.mark.parametrize("kernel", ["closed form", "without closed form"])
@pytest.mark.parametrize("backward", [True, False])
def test_graph_of_a_step_is_freed_without_the_garbage_collector(backward: bool, kernel: str) -> None:
    mll = exact_gp(KERNELS[kernel](), inputs(N))
    witnesses: list[weakref.ref] = []
    gc.collect()
    gc.disable()
    try:
        with use_torch_tensors():
            value = loss(mll)
            watch(value.grad_fn, witnesses)
            if backward:
                value.backward()
            del value
        assert len(witnesses) > 5
        assert not any(witness() for witness in witnesses)
    finally:
        gc.enable()


def test_threads_that_train_at_once_do_not_disturb_each_other() -> None:
    def train(seed: int) -> list[Tensor]:
        x = inputs(20, seed=seed)
        mll = exact_gp(k.ScaleKernel(k.MaternKernel(2.5, ard_num_dims=2)), x)
        optimizer = torch.optim.Adam(mll.parameters(), lr=0.05)
        for _ in range(20):
            optimizer.zero_grad()
            step(mll)
            optimizer.step()
        return [parameter.detach().clone() for parameter in mll.parameters()]

    found: dict[int, list[Tensor]] = {}
    with use_torch_tensors():
        expected = {seed: train(seed) for seed in range(4)}
        threads = [threading.Thread(target=lambda seed=seed: found.update({seed: train(seed)})) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert found.keys() == expected.keys()
    for seed, parameters in expected.items():
        assert all(torch.equal(a, b) for a, b in zip(found[seed], parameters, strict=True))


def through_torch_save(model: torch.nn.Module) -> torch.nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize(
    "copied",
    [copy.deepcopy, lambda mll: pickle.loads(pickle.dumps(mll)), through_torch_save],
    ids=["deepcopy", "pickle", "save"],
)
@pytest.mark.parametrize("kernel", KERNELS)
def test_trained_model_can_be_copied_and_trained_on(kernel: str, copied: Callable) -> None:
    mll = exact_gp(KERNELS[kernel](), inputs(N))
    with use_torch_tensors():
        step(mll)
        twin = copied(mll)
        twin.zero_grad()
        mll.zero_grad()
        expected = evaluate(lambda: loss(mll), dict(mll.named_parameters()), flag=True)
        evaluate(lambda: loss(twin), dict(twin.named_parameters()), flag=True).assert_equal(expected)


@pytest.mark.parametrize("kernel", KERNELS)
def test_output_and_marginal_can_be_copied_after_the_loss(kernel: str) -> None:
    mll = exact_gp(KERNELS[kernel](), inputs(N))
    with use_torch_tensors(), torch.no_grad():
        output = mll.model(*mll.model.train_inputs)
        value = mll(output, mll.model.train_targets)
        for twin in (copy.deepcopy(output), pickle.loads(pickle.dumps(output))):
            assert_near(mll(twin, mll.model.train_targets), value, rtol=1e-12)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients_the_value_is_the_same(mode: Callable, kernel: str) -> None:
    mll = exact_gp(KERNELS[kernel](), inputs(N))
    with use_torch_tensors():
        expected = loss(mll).detach()
        with mode():
            value = loss(mll)
    assert not value.requires_grad
    assert_near(value, expected, rtol=1e-12)


@pytest.mark.parametrize("kernel", ["closed form", "without closed form"])
def test_output_made_without_gradients_has_none_to_give(kernel: str) -> None:
    mll = exact_gp(KERNELS[kernel](), inputs(N))

    def step() -> Tensor:
        with torch.no_grad():
            output = mll.model(*mll.model.train_inputs)
        return mll(output, mll.model.train_targets)

    result = compare(step, dict(mll.named_parameters()))
    assert {name for name, grad in result.grads.items() if grad is not None} == {"likelihood.noise_covar.raw_noise"}


@pytest.mark.parametrize("kernel", ["closed form", "without closed form"])
def test_autocast_is_no_worse_than_with_upstream(kernel: str) -> None:
    errors = {False: 0.0, True: 0.0}
    for seed in range(10):
        mll = exact_gp(KERNELS[kernel](), inputs(30, seed=seed, dtype=torch.float32))
        results = {}
        for flag in errors:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                results[flag] = evaluate(lambda mll=mll: loss(mll), dict(mll.named_parameters()), flag).value
        exact = evaluate(lambda mll=mll: loss(mll.double()), {}, flag=False).value
        for flag, value in results.items():
            errors[flag] += (value.double() - exact).abs().item()
    assert errors[True] <= 1.5 * errors[False] + 1e-5


def test_default_dtype_of_the_process_does_not_matter() -> None:
    results = []
    for dtype in (torch.float32, torch.float64):
        torch.set_default_dtype(dtype)
        try:
            mll = exact_gp(KERNELS["closed form"]().double(), inputs(N))
            results.append(evaluate(lambda mll=mll: loss(mll), dict(mll.named_parameters()), flag=True))
        finally:
            torch.set_default_dtype(torch.float32)
    results[0].assert_near(results[1], rtol=1e-6)
    assert results[0].value.dtype == torch.float64


def test_model_moved_to_another_dtype_trains_there() -> None:
    mll = exact_gp(KERNELS["closed form"](), inputs(N))
    with use_torch_tensors(), routes(tensors=2):
        exact = step(mll)
        mll.zero_grad()
        mll.float()
        value = step(mll)
    assert value.dtype == torch.float32
    assert_near(value.double(), exact, rtol=1e-4)
    assert all(parameter.grad.dtype == torch.float32 for parameter in mll.parameters())


def test_no_data_is_treated_as_by_upstream() -> None:
    assert_same_outcome(lambda: exact_gp(KERNELS["closed form"](), inputs(0)))


def test_scattered_model_is_not_at_its_defaults() -> None:
    """The comparisons of these tests would be weak between parameters that are all alike."""
    values = torch.cat([p.detach().view(-1) for p in scatter(KERNELS["closed form"]()).parameters()])
    assert values.unique().numel() == values.numel()
