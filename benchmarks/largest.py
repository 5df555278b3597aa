"""Which is the largest n that trains in the memory at hand? Tried, not extrapolated.

The first n to be tried is the one at which the n x n matrices that a small step needs fill the memory; where that does
not train, smaller ones are tried.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from time import perf_counter

import torch

from . import peak
from .against_n import describe
from .compare import case_tables
from .machine import available_bytes, release, stamp
from .models import dense_at_every_n, model_of, training_step
from .options import DTYPES, Options
from .row import Case, Row
from .show import Table, milliseconds, say
from .timing import synchronize
from .train import D
from .ways import STOCK, TENSORS, run_in

TITLE = "Largest n that trains"
SMALL, QUICK_SMALL = 3000, 300
FILL, SHRINK, TRIES = 0.97, 0.94, 5
ON_CPU = 0.05  # GiB: without a limit of its own, this is what is taken for full
WHOLE = "all"


def cases(options: Options) -> list[Case]:
    """Return one case for each data type."""
    small = QUICK_SMALL if options.quick else SMALL
    budget = f"{options.memory[0]:g} GiB" if options.memory else WHOLE
    if not options.memory and torch.device(options.device).type != "cuda":
        budget = f"{ON_CPU:g} GiB"
    return [Case("largest", budget, n, D, dtype, options.device, kernel) for kernel, dtype, n in options.grid((small,))]


def _budget(case: Case) -> float:
    free = available_bytes(case.device)
    return free if case.case == WHOLE else min(free, float(case.case.split()[0]) * 2**30)


def _matrices(case: Case, way: str) -> float:
    step = run_in(way, training_step(model_of(case)))
    step()
    return peak.peak_bytes(step, case.device) / (case.n**2 * DTYPES[case.dtype].itemsize)


def _try(case: Case, way: str) -> tuple[float, str]:
    """Return the seconds of a step, and why there are none."""
    try:
        step = run_in(way, training_step(model_of(case)))
        synchronize(case.device)
        start = perf_counter()
        step()
        synchronize(case.device)
        return perf_counter() - start, ""
    except RuntimeError as error:  # out of memory, or a library that cannot take so many rows: both are the answer
        return 0.0, str(error).splitlines()[0]


def measure(case: Case, options: Options, advance: Callable[[float], None]) -> list[Row]:
    """Try a step at falling n until one goes through."""
    rows = []
    with dense_at_every_n():
        for way in (STOCK, TENSORS):
            itemsize = DTYPES[case.dtype].itemsize
            matrices = _matrices(case, way)
            release(case.device)
            n = math.floor(math.sqrt(FILL * _budget(case) / (matrices * itemsize)))
            values: dict[str, object] = {"matrices": matrices, "refused": {}}
            for _ in range(TRIES):
                say(f"largest, {case.dtype}: {way} tries n = {n:,}.")
                seconds, reason = _try(replace(case, n=n), way)
                release(case.device)
                if not reason:
                    values["largest"] = n
                    break
                values["refused"][str(n)] = reason
                n = math.floor(n * SHRINK)
            rows.append(Row(case, way, "step", p50=seconds or None, values=values, **stamp(case.device)))
            advance(len(rows) / 2)
    return rows


def _lines(case: Case, found: dict[str, Row]) -> list[list[str]]:
    lines = []
    for way, row in found.items():
        largest = f"{row.values['largest']:,}" if "largest" in row.values else "none of those tried"
        refused = ", ".join(f"{int(n):,}" for n in row.values["refused"]) or "-"
        lines.append([case.case, way, f"{row.values['matrices']:.2f}", refused, largest, milliseconds(row.p50)])
    return lines


def tables(rows: list[Row]) -> list[Table]:
    """Return one table for each kernel and data type."""
    return case_tables(
        rows,
        lambda row: f"{TITLE}: {describe(row)}",
        ["memory", "way", "n x n matrices", "did not train", "largest n that trained", "its step (ms)"],
        _lines,
        f"n x n matrices: peak of a step at n = {rows[0].case.n:,}. The first n tried fills {FILL:.0%} of the memory "
        f"with them, each next one is smaller by {1 - SHRINK:.0%}. The step is the first one at that n.",
    )


def pictures(rows: list[Row], folder: Path) -> list[Path]:
    """Return no pictures: the table says it."""
    return []
