"""What does a training step gain from being compiled, or captured as a CUDA graph, at a fixed shape?

Below n = 1000 a step on a GPU is mostly launches, and a graph is launched at once. A variant that does not work here is
left out by name, with what it said.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial

import torch

import gpytorch

from ..shared.measuring import Advance, Variant, cases_of, check_same, noted, rows_in_turn, steps_in, with_room
from ..shared.models import ExactGP, loss_and_gradient, model_of, training_step
from ..shared.options import Options
from ..shared.pictures import time_pictures
from ..shared.rows import Case, Row
from ..shared.tables import ratio_tables, say, titled
from ..shared.ways import STOCK, TENSORS, WAYS, run_in

TITLE = "A training step as a graph"
COMPILED, GRAPHS, CAPTURED = "torch.compile", "torch.compile, CUDA graphs", "captured CUDA graph"
WARM_UP = 3

cases = partial(cases_of, "graph", sizes=(50, 200, 1000), quick=(50,))


def _compiled(model: ExactGP, **arguments: str) -> Callable[[], torch.Tensor]:
    mll = gpytorch.mlls.ExactMarginalLogLikelihood(model.likelihood, model)
    (train_x,), train_y = model.train_inputs, model.train_targets
    forward = torch.compile(lambda: -mll(model(train_x), train_y), **arguments)

    def step() -> torch.Tensor:
        model.zero_grad()
        loss = forward()
        loss.backward()
        return loss.detach().clone()  # the next replay writes into the same memory

    return step


def _captured(model: ExactGP) -> Callable[[], torch.Tensor]:
    """Return the replay of a captured step. In a graph no value can be looked at: the factorization is not checked."""
    eager = training_step(model)
    with gpytorch.settings.trace_mode(True), torch.cuda.device(model.train_targets.device):
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UP):
                eager()
        torch.cuda.current_stream().wait_stream(side)
        model.zero_grad()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            loss = eager()

    def step() -> torch.Tensor:
        graph.replay()
        return loss

    return step


def _makers(device: str) -> dict[str, Callable[[ExactGP], Callable[[], torch.Tensor]]]:
    """Return what makes each variant's step of a model; without CUDA, by a backend that needs no compiler."""
    if torch.device(device).type != "cuda":
        say(f"graph: {GRAPHS} and {CAPTURED} are left out, as {device} has none; {COMPILED} is its aot_eager backend.")
        return {COMPILED: partial(_compiled, backend="aot_eager")}
    return {COMPILED: _compiled, GRAPHS: partial(_compiled, mode="reduce-overhead"), CAPTURED: _captured}


@with_room()
def measure(case: Case, options: Options, advance: Advance) -> list[Row]:
    """Time the variants that work in turn, after a check that they compute the same numbers."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of graph breaks
        variants, results = steps_in((STOCK, TENSORS), partial(model_of, case))
        for name, make in _makers(case.device).items():
            torch.compiler.reset()
            model = model_of(case)
            try:
                with WAYS[TENSORS]():
                    step = run_in(TENSORS, make(model))
                for _ in range(WARM_UP):
                    results[name] = loss_and_gradient(model, step)
            except Exception as error:  # whatever it is, it is the answer to whether this works
                results.pop(name, None)
                said = next(iter(str(error).splitlines()), "")
                say(f"graph, n = {case.n:,}: {name} does not work here: {type(error).__name__}: {said}")
                continue
            variants[name] = Variant(step)
        values = noted(check_same(results, case.dtype, f"loss and gradient, n = {case.n}"))
        return rows_in_turn(case, "step", variants, options, advance, values, with_memory=False)


tables = partial(
    ratio_tables,
    title=TITLE,
    caption=f"All on tensors but stock. {CAPTURED}: under gpytorch.settings.trace_mode, so the factorization is not "
    "checked. What is missing did not work.",
    with_time=(STOCK, TENSORS),
)
pictures = partial(time_pictures, title=titled(TITLE), what="Time of a training step")
