"""What does a whole loop gain? Ax's Client on Hartmann's function of six variables, as its users run it.

What is timed is the work of Ax and of what lies under it: the seconds in `get_next_trials`. Each loop has a process of
its own, with the flag set through the environment, and the two ways take turns. The first trial that Ax asks its model
for stands apart: BoTorch may compile a kernel there. In a further process a sampling profiler says whose the time after
it is.
"""

from __future__ import annotations

import logging
import os
import warnings
from contextlib import nullcontext
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from time import perf_counter
from typing import NamedTuple

import torch

from ..shared.apart import run_apart
from ..shared.machine import stamp
from ..shared.measuring import Advance, spread
from ..shared.options import InputError, Options
from ..shared.pictures import dot_pictures
from ..shared.rows import Case, Row, by_case, grouped
from ..shared.tables import TIMES_AND_RATIO, WAY, Table, case_tables, conditions, percent, ratio, say
from ..shared.ways import STOCK, TENSORS

TITLE = "A whole loop: Ax's Client, Hartmann-6"
D = 6
ONE, TWO, MIXED = "one objective", "two objectives", "mixed space"
ENVIRONMENTS = {"": {}, " with OPENBLAS_NUM_THREADS=1": {"OPENBLAS_NUM_THREADS": "1"}}
FLAGS = {STOCK: "off", TENSORS: "on"}
FIRST, OTHERS = "first trial of the model", "all other trials"
MODEL_NODE = "MBM"
ROUNDS = 3  # each of a seed of its own, as optimizers branch on rounding
BACKWARD, AX = "autograd's backward", "Ax"
PACKAGES = {"GPyTorch": ("gpytorch", "linear_operator"), "BoTorch": ("botorch",), "SciPy": ("scipy",), AX: ("ax",)}
LEVELS = "abcd"


class Loop(NamedTuple):
    """What a loop was."""

    seconds: list[float]  # the seconds of each trial
    first: int | None  # which of them was the model's first
    best: float  # the best value found of the first objective
    shares: dict[str, float]  # whose the time after it was, if that was asked for


def cases(options: Options) -> list[Case]:
    if find_spec("ax") is None:
        raise InputError("The question ax is left out, as it needs Ax: python -m pip install ax-platform.")
    if options.device != "cpu":
        raise InputError("The question ax is left out, as it runs on the CPU.")
    settings = f"{options.effort}, Ax {version('ax-platform')}, BoTorch {version('botorch')}"
    return [
        Case("ax", space + suffix, trials, D, "float64", options.device, settings=settings)
        for space in (ONE, TWO, MIXED)
        for suffix in ENVIRONMENTS
        for trials in options.choose("sizes", (14,), quick=(7,))
    ]


def loop(space: str, trials: int, seed: int, is_profiled: bool) -> Loop:
    """Ask Ax for so many trials one by one; `seed` decides its random numbers."""
    from ax.api.client import Client
    from ax.api.configs import ChoiceParameterConfig, RangeParameterConfig
    from botorch.test_functions import Hartmann

    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    hartmann = Hartmann(negate=True)
    parameters = [RangeParameterConfig(f"x{i}", (0.0, 1.0), "float") for i in range(D)]
    if space == MIXED:
        parameters[4:] = [RangeParameterConfig("x4", (0, 10), "int"), ChoiceParameterConfig("x5", [*LEVELS], "str")]
    client = Client(random_seed=seed)
    client.configure_experiment(parameters)
    client.configure_optimization("first, second" if space == TWO else "first")
    profiler = import_module("pyinstrument").Profiler(interval=1e-3, async_mode="disabled") if is_profiled else None
    seconds, first, best = [], None, float("-inf")
    for number in range(trials):
        with profiler if profiler is not None and first is not None else nullcontext():
            start = perf_counter()
            ((trial, values),) = client.get_next_trials(max_trials=1).items()
            seconds.append(perf_counter() - start)
        if first is None and client.summarize()["generation_node"].iloc[-1] == MODEL_NODE:
            first = number
        x = torch.tensor([_number(values[f"x{i}"], space == MIXED and i == 4) for i in range(D)], dtype=torch.float64)
        found = {"first": float(hartmann(x)), "second": float(hartmann(x.flip(0)))}
        client.complete_trial(trial, {name: found[name] for name in (found if space == TWO else ["first"])})
        best = max(best, found["first"])
    return Loop(seconds, first, best, {} if profiler is None else _shares(profiler.last_session.frame_records))


def _number(value: float | str, is_of_ten: bool) -> float:
    return LEVELS.index(value) / (len(LEVELS) - 1) if isinstance(value, str) else value / 10 if is_of_ten else value


def _shares(records: list[tuple[list[str], float]]) -> dict[str, float]:
    """Return the share of time of each package: a sample is of the innermost frame that belongs to one.

    :param records: pyinstrument's samples: the frames, outermost first, each a function, its file and its line, and
        the seconds.
    """
    inside = {
        owner: tuple(f"{folder}{os.sep}" for name in names for folder in import_module(name).__path__)
        for owner, names in PACKAGES.items()
    } | {BACKWARD: (torch.autograd.graph.__file__,)}
    shares = dict.fromkeys(inside, 0.0)
    for frames, seconds in records:
        files = [frame.split("\0")[1] for frame in reversed(frames)]
        owners = (owner for file in files for owner, folders in inside.items() if file.startswith(folders))
        shares[next(owners, AX)] += seconds
    total = sum(shares.values())
    return {owner: seconds / total for owner, seconds in shares.items()}


def measure(case: Case, options: Options, advance: Advance) -> list[Row]:
    """Run loops both ways, in processes in turn, and one more each under the profiler."""
    space = case.case.split(" with ")[0]
    environment = ENVIRONMENTS[case.case[len(space) :]]
    is_profiled = find_spec("pyinstrument") is not None
    if not is_profiled:
        say("Whose the time is, is left out, as it needs pyinstrument: python -m pip install pyinstrument.")
    plan = [(seed, way, False) for seed in range(1 if options.quick else ROUNDS) for way in FLAGS]
    plan += [(0, way, True) for way in FLAGS if is_profiled]
    loops: dict[str, list[Loop]] = {way: [] for way in FLAGS}
    shares: dict[str, dict[str, float]] = {way: {} for way in FLAGS}
    for done, (seed, way, profiled) in enumerate(plan):
        variables = {"GPYTORCH_USE_TORCH_TENSORS": FLAGS[way], **environment}
        ran = run_apart(loop, space, case.n, seed, profiled, environment=variables)
        if ran.first is None or case.n < ran.first + 2:
            raise InputError(f"{case.n} trials are too few: Ax has to ask its model for two at least.")
        if profiled:
            shares[way] = ran.shares
        else:
            loops[way].append(ran)
        advance((done + 1) / len(plan))
    rows = []
    for way, found in loops.items():
        seconds = {FIRST: [ran.seconds[ran.first] for ran in found]}
        seconds[OTHERS] = [sum(ran.seconds) - first for ran, first in zip(found, seconds[FIRST], strict=True)]
        for mode, measured in seconds.items():
            values = {"best": [ran.best for ran in found], "shares": shares[way]} if mode == OTHERS else {}
            rows.append(Row(case, way, mode, **spread(measured), values=values, **stamp(case.device)))
    return rows


def _title(row: Row) -> str:
    return f"{TITLE}, {row.mode}: {row.case.n} trials, {row.case.settings}; {conditions(row)}"


LOOP = {"loop": lambda row, found: row.case.case}
OWNERS = {
    owner: lambda row, found, owner=owner: percent(row.values["shares"][owner]) for owner in (*PACKAGES, BACKWARD)
}


def tables(rows: list[Row]) -> list[Table]:
    """Return a table of times for the model's first trial and one for all others, and one of whose the latter is."""
    by_mode = grouped(rows, lambda row: row.mode)
    caption = "Seconds in get_next_trials: medians and [20 %, 80 %] quantiles of loops from other seeds, in turn."
    made = [
        table for group in by_mode.values() for table in case_tables(group, _title, LOOP | TIMES_AND_RATIO, caption)
    ]
    return made + case_tables(
        [row for row in by_mode[OTHERS] if row.values["shares"]],
        lambda row: f"Whose the time is. {_title(row)}",
        LOOP | WAY | OWNERS,
        "Shares of the samples of a profiler: each is of the innermost function that is of one of these, with what it "
        "calls in torch and NumPy. autograd's backward: torch's own, wherever it was called from.",
        ways=(STOCK, TENSORS),
    )


def pictures(rows: list[Row], folder: Path) -> list[Path]:
    rows = [row for row in rows if row.mode == OTHERS]
    return dot_pictures(rows, folder, _title, "Time in get_next_trials", label=lambda row: row.case.case)


def remarks(rows: list[Row]) -> list[str]:
    """Return what a whole loop gains, a line for each."""
    return [
        f"Ax, {case.case}: {found[STOCK].p50:.1f} s in get_next_trials with the flag off, {found[TENSORS].p50:.1f} s "
        f"with it on, {ratio(found[STOCK], found[TENSORS]):.2f} times as fast."
        for case, found in by_case([row for row in rows if row.mode == OTHERS]).items()
    ]
