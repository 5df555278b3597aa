"""From works to rows: variants that compute the same numbers, if there is memory, are run in turn in one process.

A slow minute of the machine slows them all. Nothing is timed before it is known to agree.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from time import perf_counter
from typing import Any

import numpy as np
import torch

from . import peak
from .machine import available_bytes, stamp, synchronize
from .models import D, dense_at_every_n, loss_and_gradient, training_step
from .options import DTYPES, Options
from .rows import Case, Row
from .tables import say
from .ways import run_in

SETTLE = 0.03  # how long a turn runs without timing, in seconds; beside a run of more than a second that is nothing
STOCK_MATRICES = 12  # n x n matrices to have room for: stock holds 9 to 10 of them at its peak
# Relative to the reference's norm. Both sides round: float32 loses some digits to the conditioning of the covariance.
TOLERANCES = {"float64": 1e-6, "float32": 2e-2}

Advance = Callable[[float], None]  # is told what fraction is done
Measure = Callable[[Case, Options, Advance], list[Row]]


def cases_of(
    question: str,
    options: Options,
    sizes: tuple[int, ...],
    quick: tuple[int, ...] | None = None,
    dtypes: tuple[str, ...] = ("float64",),
    kernels: tuple[str, ...] = ("rbf",),
    **fields: Any,
) -> list[Case]:
    """Return one synthetic case for each kernel, data type and n: those asked for, or else the question's.

    :param quick: Sizes of a quick run (Default: `sizes`).
    :param fields: Other fields of the cases.
    """
    fields = {"case": "synthetic", "settings": options.effort} | fields
    return [
        Case(question, n=n, d=D, dtype=dtype, device=options.device, kernel=kernel, **fields)
        for kernel, dtype, n in options.grid(options.choose("sizes", sizes, quick), dtypes, kernels)
    ]


@dataclass(frozen=True)
class Variant:
    """One way of doing the same work."""

    run: Callable[[], Any]  # the work
    prepare: Callable[[], object] = lambda: None  # what has to happen before each run and is not timed


def steps_in(
    ways: tuple[str, ...],
    make: Callable[[], torch.nn.Module],
    step_of: Callable[[torch.nn.Module], Callable[[], torch.Tensor]] = training_step,
) -> tuple[dict[str, Variant], dict[str, torch.Tensor]]:
    """Return a training step in each of the ways, each of a model of its own, and the loss and gradient of each."""
    models = {way: make() for way in ways}
    variants = {way: Variant(run_in(way, step_of(model))) for way, model in models.items()}
    return variants, {way: loss_and_gradient(model, variants[way].run) for way, model in models.items()}


def timed(work: Callable[[], object], device: str) -> float:
    """Return the seconds that `work` takes on `device`."""
    synchronize(device)
    start = perf_counter()
    work()
    synchronize(device)
    return perf_counter() - start


def in_turn(
    variants: dict[Any, Variant],
    device: str,
    seconds: float,
    advance: Advance = lambda fraction: None,
    least: int = 5,
    most: int = 100,
) -> dict[Any, list[float]]:
    """Run the variants in turn (a, b, a, b, ...) for about so many seconds and return the times of each, in seconds.

    A turn begins with runs that are not timed: where the variants use different thread pools (MKL's, OpenBLAS's,
    JAX's), the threads of the one before still spin for some milliseconds. Then it times a run, or as many as fit into
    the same while.

    :param least: At least so many rounds; likewise `most`.
    """

    def once(variant: Variant) -> float:
        variant.prepare()
        return timed(variant.run, device)

    def several(variant: Variant) -> list[float]:
        end = perf_counter() + SETTLE  # of the clock on the wall: of a short run the most is spent around it
        runs = [once(variant)]
        while perf_counter() < end:
            runs.append(once(variant))
        return runs

    warm = {provider: several(variant)[-1] for provider, variant in variants.items()}
    turns = sum(2 * max(SETTLE, run) if run < 1 else run for run in warm.values())
    rounds = int(np.clip(seconds / turns, least, most))
    times: dict[Any, list[float]] = {provider: [] for provider in variants}
    for done in range(rounds):
        for provider, variant in variants.items():
            if warm[provider] < 1:
                several(variant)
            times[provider] += several(variant)
        advance((done + 1) / rounds)
    return times


def spread(times: list[float]) -> dict[str, float]:
    """Return the quantiles of `times` under the names of a row's fields."""
    return {f"p{percent}": float(np.percentile(times, percent)) for percent in (20, 50, 80)}


def rows_in_turn(
    case: Case,
    mode: str,
    variants: dict[str, Variant],
    options: Options,
    advance: Advance,
    values: dict[str, dict[str, Any]] | None = None,
    with_memory: bool = True,
    least: int = 5,
) -> list[Row]:
    """Run the variants in turn and return a row for each, with its peak memory (of a run of its own).

    :param values: Results other than time, by provider.
    :param with_memory: Whether to look at memory; following the allocations of a long run takes longer than the run.
    :param least: At least so many rounds.
    """
    peaks = {}
    for provider, variant in variants.items() if with_memory else ():
        variant.prepare()
        peaks[provider] = peak.peak_bytes(variant.run, case.device)
    times = in_turn(variants, case.device, options.seconds, advance, least)
    return [
        Row(
            case=case,
            provider=provider,
            mode=mode,
            **spread(times[provider]),
            peak_memory=peaks.get(provider),
            values=(values or {}).get(provider, {}),
            **stamp(case.device),
        )
        for provider in variants
    ]


class Disagreement(RuntimeError):
    """Two providers do not compute the same numbers; their times must not be compared."""


def distance(result: torch.Tensor, reference: torch.Tensor) -> float:
    """Return the distance of `result` from `reference`, relative to the norm of `reference`."""
    return float((result - reference).norm() / reference.norm())


def check_same(results: dict[str, torch.Tensor], dtype: str, what: str) -> dict[str, float]:
    """Raise :class:`Disagreement` unless all of `results`, a vector by provider, equal the first one to rounding.

    :param what: What was computed, for the message.
    :return: Each provider's distance from the first one.
    """
    (first, reference), *_ = results.items()
    distances = {provider: distance(result, reference) for provider, result in results.items()}
    for provider, error in distances.items():
        if not error <= TOLERANCES[dtype]:
            raise Disagreement(f"{what}: {provider} differs from {first} by {error:.1e} (relative, {dtype}).")
    return distances


def noted(distances: dict[str, float]) -> dict[str, dict[str, float]]:
    """Return distances from stock as the values of rows, by provider."""
    return {provider: {"distance_from_stock": error} for provider, error in distances.items()}


def fits(case: Case, matrices: float, what: str = "") -> bool:
    """Return whether so many n x n matrices fit into the free memory; if not, say that the case, or `what`, is out."""
    needed = matrices * case.batch * case.n**2 * DTYPES[case.dtype].itemsize
    free = available_bytes(case.device)
    if needed > free:
        say(
            f"{case.question}, n = {case.n:,}, {case.dtype}: {what + ' is ' if what else ''}left out, as it needs "
            f"{needed / 2**30:.1f} GiB and {free / 2**30:.1f} are free."
        )
    return needed <= free


def with_room(matrices: float = STOCK_MATRICES) -> Callable[[Measure], Measure]:
    """Decorate a `measure`: it uses Cholesky at every n, and gives no rows where so many n x n matrices do not fit."""

    def decorated(measure: Measure) -> Measure:
        @wraps(measure)
        def guarded(case: Case, options: Options, advance: Advance) -> list[Row]:
            if not fits(case, matrices):
                return []
            with dense_at_every_n():
                return measure(case, options, advance)

        return guarded

    return decorated


def does_fit(work: Callable[[], object]) -> bool:
    """Run `work` and return whether there was memory enough for it."""
    try:
        work()
    except torch.OutOfMemoryError:
        return False
    except RuntimeError as error:
        if "can't allocate memory" not in str(error):  # the CPU's allocator has no exception of its own
            raise
        return False
    return True
