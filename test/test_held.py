"""Nothing is held: what a prediction keeps goes with its model, by weak references to each of the parts."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from both_ways import GP, exact_gp, inputs, targets
from botorch.acquisition import qKnowledgeGradient
from botorch.models import SingleTaskGP
from botorch.optim import optimize_acqf
from botorch.sampling import SobolQMCNormalSampler
from botorch.settings import propagate_grads
from torch import Tensor

from gpytorch import kernels as k
from gpytorch import settings
from gpytorch.models import cholesky_factor, dense_prediction_strategy
from gpytorch.settings import use_torch_tensors

Read = Callable[[GP, Tensor], None]


class Watched:
    """All strategies, Cholesky factors and models that were made while a test ran and are still there."""

    def __init__(self) -> None:
        self.made: dict[str, int] = {}
        self.left: list[weakref.ref] = []

    def add(self, each: object) -> None:
        name = type(each).__name__
        self.made[name] = self.made.get(name, 0) + 1
        self.left.append(weakref.ref(each))

    def assert_gone(self, *made: str) -> None:
        """Assert that nothing is left, and that something of each of these classes was there."""
        assert set(made) <= self.made.keys(), f"only {sorted(self.made)} were made"
        gc.collect()  # a module's hooks are methods of its own
        left = [type(each).__name__ for reference in self.left if (each := reference()) is not None]
        assert not left, f"{left} are kept"


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> Iterator[Watched]:
    """Watch what is made, with the flag on."""
    seen = Watched()

    def watch(cls: type) -> None:
        init = cls.__init__

        def watching(self, *args, **options) -> None:
            init(self, *args, **options)
            seen.add(self)

        monkeypatch.setattr(cls, "__init__", watching)

    for cls in (
        dense_prediction_strategy.DensePredictionStrategy,
        cholesky_factor.CholeskyFactor,
        cholesky_factor.BorderedFactor,
        GP,
        SingleTaskGP,
    ):
        watch(cls)
    with use_torch_tensors():
        yield seen


def a_model(batch: tuple[int, ...] = (), x: Tensor | None = None) -> GP:
    x = inputs(8, batch=batch) if x is None else x
    kernel = k.ScaleKernel(k.RBFKernel(batch_shape=torch.Size(batch)), batch_shape=torch.Size(batch))
    return exact_gp(kernel, x, targets(x.detach())).eval().model


def new_points(batch: tuple[int, ...], seed: int = 7) -> tuple[Tensor, Tensor]:
    x = inputs(2, batch=batch, seed=seed)
    return x, targets(x, seed)


def predicts(batch: tuple[int, ...], read: Read) -> None:
    read(a_model(batch), inputs(3, batch=batch, seed=3))


def goes_on_with_new_data(batch: tuple[int, ...], read: Read) -> None:
    model = a_model(batch)
    read(model, inputs(3, batch=batch, seed=3))
    before = weakref.ref(model.prediction_strategy)
    model.set_train_data(*new_points(batch), strict=False)
    assert before() is None  # though the model lives
    read(model, inputs(3, batch=batch, seed=3))


def fantasizes(batch: tuple[int, ...], read: Read, levels: int = 1) -> None:
    x = inputs(3, batch=batch, seed=3)
    first = model = a_model(batch)
    read(model, x)
    for level in range(levels):
        model = model.get_fantasy_model(*new_points(batch, seed=level))
        read(model, x)
    fantasies = weakref.ref(model.prediction_strategy)
    model.train()
    assert fantasies() is None  # though the model that they come from lives
    read(first, x)


def fantasizes_twice(batch: tuple[int, ...], read: Read) -> None:
    fantasizes(batch, read, levels=2)


def conditions_in_botorch(batch: tuple[int, ...], read: Read) -> None:
    x = inputs(8, batch=batch)
    model = SingleTaskGP(x, targets(x).unsqueeze(-1)).eval()
    x, y = new_points(batch)
    for grads in (False, True):
        with propagate_grads(grads):
            read(model, x)
            read(model.condition_on_observations(x, y.unsqueeze(-1)), x)
            read(model.fantasize(x, SobolQMCNormalSampler(torch.Size([2]))), x)


class Embedded(torch.nn.Module):
    """A model of inputs that are learned with it."""

    def __init__(self, batch: tuple[int, ...]) -> None:
        super().__init__()
        self.points = torch.nn.Parameter(inputs(8, batch=batch))
        self.gp = a_model(batch, self.points.tanh())


def is_part_of_a_module_that_learns_its_inputs(batch: tuple[int, ...], read: Read) -> None:
    x = inputs(3, batch=batch, seed=3)
    read(Embedded(batch).gp, x)
    outer = Embedded(batch)
    outer.gp(x)
    read(outer.gp.get_fantasy_model(*new_points(batch)), x)


def fails_in_a_backward(model: GP, x: Tensor) -> None:
    def fail(_: Tensor) -> None:
        raise RuntimeError("on purpose")

    variance = model(x.clone().requires_grad_()).variance
    variance.register_hook(fail)
    variance.sum().backward()


def fails_half_way(batch: tuple[int, ...], read: Read) -> None:
    model, x = a_model(batch), inputs(3, batch=batch, seed=3)
    read(model, x)
    wrong_targets, wrong_inputs = targets(x)[..., :2], x[..., :1]
    for work in (
        lambda: model.get_fantasy_model(x, wrong_targets),
        lambda: model(wrong_inputs),
        lambda: fails_in_a_backward(model, x),
    ):
        try:
            work()
        except RuntimeError:
            continue
        raise AssertionError("no error")
    read(model, x)


USES: dict[str, tuple[Callable[[tuple[int, ...], Read], None], tuple[str, ...]]] = {
    "predicts": (predicts, ("CholeskyFactor", "GP")),
    "goes on with new data": (goes_on_with_new_data, ("CholeskyFactor", "GP")),
    "fantasizes": (fantasizes, ("BorderedFactor", "GP")),
    "fantasizes twice": (fantasizes_twice, ("BorderedFactor", "GP")),
    "conditions in BoTorch": (conditions_in_botorch, ("BorderedFactor", "SingleTaskGP")),
    "is part of a module that learns its inputs": (
        is_part_of_a_module_that_learns_its_inputs,
        ("BorderedFactor", "GP"),
    ),
    "fails half-way": (fails_half_way, ("CholeskyFactor", "GP")),
}


@contextmanager
def reading(backward: bool, fast: bool, detached: bool) -> Iterator[Read]:
    """The settings that are asked for, and what reads mean and variance under them."""

    def read(model: GP, x: Tensor) -> None:
        x = x.clone().requires_grad_()
        posterior = model(x)
        value = posterior.mean.sum() + posterior.variance.sum() + posterior.covariance_matrix.sum()
        assert value.requires_grad
        if backward:
            value.backward()

    with settings.fast_pred_var(fast), settings.detach_test_caches(detached):
        yield read


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("detached", [False, True])
@pytest.mark.parametrize("fast", [False, True])
def test_nothing_is_held_of_a_model_that(use: str, fast: bool, detached: bool, watched: Watched) -> None:
    function, made = USES[use]
    for backward in (False, True):
        for batch in ((), (2,)):
            with reading(backward, fast, detached) as read:
                function(batch, read)
    watched.assert_gone("DensePredictionStrategy", *made)


def test_nothing_is_held_of_a_loop_of_knowledge_gradient(watched: Watched) -> None:
    x = inputs(8)
    y = targets(x).unsqueeze(-1)
    for _ in range(2):
        model = SingleTaskGP(x, y).eval()
        acquisition = qKnowledgeGradient(model, num_fantasies=4)
        bounds = torch.tensor([[0.0, 0.0], [1.0, 1.0]]).double()
        found, _ = optimize_acqf(acquisition, bounds, 1, num_restarts=2, raw_samples=8, options={"maxiter": 3})
        x, y = torch.cat([x, found]), torch.cat([y, targets(found).unsqueeze(-1)])
    del model, acquisition
    watched.assert_gone("DensePredictionStrategy", "BorderedFactor", "SingleTaskGP")
