"""Predictions through faults, copies, threads, processes and a long life: as usable afterwards as before."""

from __future__ import annotations

import copy
import gc
import os
import pickle
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import pytest
import torch
from both_ways import (
    GP,
    assert_leaves_nothing_behind,
    assert_near,
    evaluate,
    exact_gp,
    growth_of_process,
    inputs,
    loss,
    routes,
)
from torch import Tensor

from gpytorch import kernels as k
from gpytorch import settings
from gpytorch.models.dense_prediction_strategy import DensePredictionStrategy
from gpytorch.settings import use_torch_tensors

ROOT = Path(__file__).resolve().parents[1]
N = 12
KERNELS: dict[str, Callable[[], k.Kernel]] = {
    "closed form": lambda: k.ScaleKernel(k.MaternKernel(2.5, ard_num_dims=2)),
    "without closed form": lambda: k.ScaleKernel(k.PiecewisePolynomialKernel(q=2)),
}
each_kernel = pytest.mark.parametrize("kernel", KERNELS)


def a_model(kernel: str, seed: int = 0, n: int = N) -> GP:
    return exact_gp(KERNELS[kernel](), inputs(n, seed=seed)).eval().model


def predict(model: GP, x: Tensor) -> list[Tensor]:
    """All that there is to read of a prediction, on tensors."""
    with use_torch_tensors():
        observed = model.likelihood(model(x))
        latent = model(x)
        return [observed.mean, observed.variance, latent.variance, latent.covariance_matrix]


def assert_all_equal(actual: list[Tensor], expected: list[Tensor]) -> None:
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


class FailsOnce:
    """A function that raises at one of its calls, and from then on is itself again."""

    def __init__(self, function: Callable, error: type[BaseException], call: int) -> None:
        self.function, self.error, self.left = function, error, call

    def __call__(self, *args, **options):
        self.left -= 1
        if self.left == 0:
            raise self.error("on purpose")
        return self.function(*args, **options)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, KeyboardInterrupt])
@pytest.mark.parametrize(
    ("where", "call"),
    [
        ("linalg.cholesky_ex", 1),
        ("linalg.solve_triangular", 1),
        ("linalg.solve_triangular", 2),
        ("linalg.solve_triangular", 3),
        ("cdist", 2),
        ("Tensor.square", 1),
    ],
)
def test_fault_half_way_leaves_a_model_that_predicts_as_a_new_one(
    where: str, call: int, error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    x = inputs(5, seed=3)
    expected = predict(a_model("closed form"), x)
    model = a_model("closed form")
    place, name = (torch, where) if "." not in where else (getattr(torch, where.split(".")[0]), where.split(".")[1])
    fault = FailsOnce(getattr(place, name), error, call)
    # A function takes no self: a method needs something that binds.
    patch = fault if place is not torch.Tensor else lambda self, *args: fault(self, *args)
    with monkeypatch.context() as patched, torch.no_grad():
        patched.setattr(place, name, patch)
        with pytest.raises(error, match="on purpose"):
            predict(model, x)
        assert fault.left == 0
        assert use_torch_tensors.is_default() or use_torch_tensors.off()
        assert_all_equal(predict(model, x), expected)
    assert_all_equal(predict(model, x), expected)


def test_fault_in_a_backward_through_a_prediction_leaves_a_model_that_predicts_and_differentiates(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, x = a_model("closed form"), inputs(5, seed=3).requires_grad_()
    expected = torch.autograd.grad(predict(model, x)[1].sum(), x)
    variance = predict(model, x)[1]
    variance.register_hook(FailsOnce(lambda grad: grad, torch.OutOfMemoryError, 1))
    with pytest.raises(torch.OutOfMemoryError):
        variance.sum().backward()
    assert x.grad is None
    assert all(parameter.grad is None for parameter in model.parameters())
    assert_all_equal(torch.autograd.grad(predict(model, x)[1].sum(), x), expected)


@pytest.mark.alone
@each_kernel
@pytest.mark.parametrize("with_grad", [False, True])
def test_many_predictions_leave_nothing_behind(with_grad: bool, kernel: str) -> None:
    model = a_model(kernel)
    x = inputs(3, seed=3).requires_grad_(with_grad)

    def work(calls: int) -> None:
        for _ in range(calls):
            with torch.set_grad_enabled(with_grad), use_torch_tensors():
                posterior = model.likelihood(model(x))
                value = posterior.mean.sum() + posterior.variance.sum()
            if with_grad:
                torch.autograd.grad(value, x)

    assert_leaves_nothing_behind(work, 5, 200 if kernel == "closed form" else 50)


@pytest.mark.alone
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="the process's memory is read from /proc")
@each_kernel
def test_fitting_and_predicting_again_and_again_does_not_grow_the_process(kernel: str) -> None:
    n = 200
    mll = exact_gp(KERNELS[kernel](), inputs(n))
    x = inputs(n, seed=3)

    def work() -> None:
        mll.train()
        with use_torch_tensors():
            loss(mll).backward()
            mll.eval()
            mll.model(x).variance.sum().backward()

    assert growth_of_process(work, 40) < n * n * 8 / 4  # a quarter of one matrix


@each_kernel
def test_what_a_prediction_holds_is_freed_without_the_garbage_collector(kernel: str) -> None:
    model = a_model(kernel)
    with torch.no_grad():
        predict(model, inputs(40, seed=3))
    gc.collect()
    gc.disable()
    try:
        with use_torch_tensors(), torch.no_grad():
            posterior = model(inputs(40, seed=4))
            watched = [weakref.ref(posterior.lazy_covariance_matrix), weakref.ref(posterior.covariance_matrix)]
            del posterior
        assert [watch() for watch in watched] == [None, None]
        factor = weakref.ref(model.prediction_strategy.factor())
        model.train()
        assert factor() is None
    finally:
        gc.enable()


def fit_and_predict(seed: int) -> list[Tensor]:
    mll = exact_gp(KERNELS["closed form"](), inputs(20, seed=seed))
    optimizer = torch.optim.Adam(mll.parameters(), lr=0.05)
    for _ in range(10):
        optimizer.zero_grad()
        loss(mll).backward()
        optimizer.step()
    mll.eval()
    posterior = mll.likelihood(mll.model(inputs(40, seed=seed + 100)))
    return [posterior.mean.detach(), posterior.variance.detach(), posterior.covariance_matrix.detach()]


def in_threads(work: Callable[[int], list[Tensor]], count: int) -> dict[int, list[Tensor]]:
    found: dict[int, list[Tensor]] = {}
    threads = [threading.Thread(target=lambda i=i: found.update({i: work(i)})) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def test_threads_that_fit_and_predict_at_once_do_not_disturb_each_other() -> None:
    with use_torch_tensors():
        expected = {seed: fit_and_predict(seed) for seed in range(4)}
        found = in_threads(fit_and_predict, 4)
    assert found.keys() == expected.keys()
    for seed, results in expected.items():
        assert_all_equal(found[seed], results)


def test_threads_that_predict_with_one_fitted_model_get_its_predictions() -> None:
    model = a_model("closed form")
    points = [inputs(5, seed=seed) for seed in range(4)]
    with use_torch_tensors(), torch.no_grad():
        model(points[0]).variance  # noqa: B018 (fills the caches)

        def work(seed: int) -> list[Tensor]:
            with torch.no_grad():  # a thread's own state
                posterior = model(points[seed])
                return [posterior.mean, posterior.variance]

        expected = [work(seed) for seed in range(4)]
        found = in_threads(work, 4)
    for seed, results in enumerate(expected):
        assert_all_equal(found[seed], results)


# What a child process computes with a model that its parent has fitted and predicted with.
PROCESSES = """
import multiprocessing, pickle, sys
import torch
from gpytorch import dense, settings
from both_ways import exact_gp, inputs, loss
from gpytorch import kernels as k

def work(mll, x, given):
    torch.set_num_threads(1)
    dense.routes.clear()
    values = [part.detach() for part in (mll.model(x).mean, mll.model(x).variance)]
    mll.train()
    mll.zero_grad()
    loss(mll).backward()
    values += [parameter.grad for parameter in mll.parameters()]
    given.send(pickle.dumps((dict(dense.routes), values)))

if __name__ == "__main__":
    torch.set_num_threads(1)
    assert settings.use_torch_tensors.on()
    mll = exact_gp(k.ScaleKernel(k.RBFKernel()), inputs(12))
    loss(mll).backward()
    mll.eval()
    x = inputs(5, seed=3)
    with torch.no_grad():
        mll.model(x).variance
    if sys.argv[1] == "spawn":
        mll.train().eval()  # a cache may be part of a graph, which does not go to another process
    context = multiprocessing.get_context(sys.argv[1])
    ours, theirs = context.Pipe(duplex=False)
    child = context.Process(target=work, args=(mll, x, theirs))
    child.start()
    assert ours.poll(1200), "the child does not answer"
    routes, found = pickle.loads(ours.recv())
    child.join()
    assert child.exitcode == 0 and set(routes) == {"tensors"}, (child.exitcode, routes)
    local, mine = context.Pipe(duplex=False)
    work(mll, x, mine)
    _, expected = pickle.loads(local.recv())
    assert len(found) == len(expected) > 4
    for a, b in zip(found, expected):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
"""


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_child_process_goes_on_with_a_model_on_tensors(method: str, tmp_path: Path) -> None:
    file = tmp_path / "processes.py"
    file.write_text(PROCESSES)
    path = os.pathsep.join(filter(None, [str(ROOT), str(ROOT / "test"), os.environ.get("PYTHONPATH")]))
    variables = {**os.environ, "PYTHONPATH": path, "GPYTORCH_USE_TORCH_TENSORS": "1"}
    command = [sys.executable, "-W", "ignore", str(file), method]
    done = subprocess.run(command, env=variables, capture_output=True, text=True, check=False, timeout=1500)
    assert done.returncode == 0, done.stderr


STAGES: dict[str, Callable[[GP, Tensor], object]] = {
    "new": lambda model, x: None,
    "after the mean": lambda model, x: model(x).mean,
    "after a variance": lambda model, x: model(x).variance,
    "after a backward": lambda model, x: model(x).variance.sum().backward(),
    "training again": lambda model, x: (model(x).variance, model.train()),
}


@each_kernel
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
@pytest.mark.parametrize("stage", STAGES)
def test_copy_made_at_any_stage_predicts_the_same(stage: str, copied: Callable, kernel: str) -> None:
    model, x = a_model(kernel), inputs(5, seed=3)
    with use_torch_tensors():
        STAGES[stage](model, x)
        twin = copied(model).eval()
    model.eval()
    for ours, expected in zip(predict(twin, x), predict(model, x), strict=True):
        assert_near(ours, expected, rtol=1e-10)


@each_kernel
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_prediction_without_gradients_has_the_same_numbers(mode: Callable, kernel: str) -> None:
    model, x = a_model(kernel), inputs(5, seed=3)
    expected = predict(a_model(kernel), x)
    with mode():
        found = predict(model, x)
    assert not any(part.requires_grad for part in found)
    for ours, theirs in zip(found, expected, strict=True):
        assert_near(ours, theirs.detach(), rtol=1e-12)


@each_kernel
def test_caches_made_without_gradients_serve_gradients_in_the_test_points(kernel: str) -> None:
    x = inputs(5, seed=3).requires_grad_()
    warm = a_model(kernel)
    with torch.no_grad():
        predict(warm, x)
    grads = [torch.autograd.grad(predict(model, x)[1].sum(), x)[0] for model in (a_model(kernel), warm)]
    assert_near(grads[1], grads[0], rtol=1e-12)


@each_kernel
def test_prediction_under_autocast_ends_as_upstreams(kernel: str) -> None:
    ends = []
    for flag in (False, True):
        model = a_model(kernel).float()
        with use_torch_tensors(flag), torch.autocast("cpu", dtype=torch.bfloat16):
            posterior = model(inputs(5, seed=3, dtype=torch.float32))
            ends.append(posterior.mean.dtype)
            with pytest.raises(RuntimeError) as caught:  # no least variance is known for the type
                posterior.variance  # noqa: B018
        ends.append(str(caught.value))
    assert ends[:2] == ends[2:]


def test_default_dtype_of_the_process_does_not_matter() -> None:
    x = inputs(5, seed=3)
    expected = predict(a_model("closed form"), x)
    torch.set_default_dtype(torch.float64)
    try:
        found = predict(a_model("closed form"), x)
    finally:
        torch.set_default_dtype(torch.float32)
    for ours, theirs in zip(found, expected, strict=True):
        assert_near(ours, theirs, rtol=1e-6)  # initial parameters are rounded to the default type


@each_kernel
def test_model_moved_to_another_dtype_predicts_there_once_its_caches_are_gone(kernel: str) -> None:
    model, x = a_model(kernel), inputs(5, seed=3)
    expected = predict(model, x)
    model.float()
    for flag in (False, True):  # the caches are of the other type, with upstream as here
        with use_torch_tensors(flag), pytest.raises(RuntimeError, match=r"dtype|scalar type"):
            model(x.float()).mean  # noqa: B018
    model.train().eval()
    for ours, theirs in zip(predict(model, x.float()), expected, strict=True):
        assert ours.dtype == torch.float32
        assert_near(ours.double(), theirs, rtol=1e-3)


@pytest.mark.parametrize("batch", [(), (2,)])
@each_kernel
def test_no_test_points_have_an_empty_posterior(kernel: str, batch: tuple[int, ...]) -> None:
    empty = torch.empty(*batch, 0, 2, dtype=torch.float64)
    shapes = {}
    for flag in (False, True):
        model = a_model(kernel)
        with use_torch_tensors(flag):
            posterior = model.likelihood(model(empty))
            parts = posterior.mean, posterior.variance, posterior.covariance_matrix
        shapes[flag] = [(part.shape, part.dtype) for part in parts]
    assert shapes[True] == shapes[False]


@each_kernel
def test_test_point_with_nan_has_nan_and_the_others_their_own_numbers(kernel: str) -> None:
    model, x = a_model(kernel), inputs(5, seed=3)
    others = torch.arange(5) != 1
    mean, variance = predict(model, x)[:2]
    x[1, 0] = float("nan")
    with routes():  # with the factor that is there
        for ours, expected in zip(predict(model, x)[:2], (mean, variance), strict=True):
            assert ours[1].isnan()
            assert_near(ours[others], expected[others], rtol=1e-10)


def test_training_goes_on_to_the_same_numbers_after_predictions() -> None:
    mlls = [exact_gp(KERNELS["closed form"](), inputs(N)) for _ in range(2)]
    mlls[0].eval()
    predict(mlls[0].model, inputs(5, seed=3))[1].sum().backward()
    mlls[0].train()
    results = [evaluate(lambda mll=mll: loss(mll), dict(mll.named_parameters()), flag=True) for mll in mlls]
    results[0].assert_equal(results[1])


def test_strategy_of_these_tests_is_the_one_on_tensors() -> None:
    for kernel in KERNELS:
        model = a_model(kernel)
        with routes(tensors=1), settings.debug(False):
            predict(model, inputs(5, seed=3))
        assert type(model.prediction_strategy) is DensePredictionStrategy


def test_model_that_predicted_without_gradients_can_be_sent_to_another_process() -> None:
    model = a_model("closed form")
    with torch.no_grad():
        expected = predict(model, inputs(3, seed=3))
    sent = pickle.loads(ForkingPickler.dumps(model))  # with gradients on, where tensors of a graph are refused
    with torch.no_grad():
        for actual, value in zip(predict(sent, inputs(3, seed=3)), expected, strict=True):
            assert_near(actual, value)
