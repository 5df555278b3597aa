"""Which is the largest n that trains in the memory at hand? Tried, not extrapolated.

The first n to be tried is the one at which the n x n matrices that a small step needs fill the memory; the table says
how it goes on.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from ..shared import peak
from ..shared.machine import available_bytes, release, stamp
from ..shared.measuring import Advance, timed
from ..shared.models import D, dense_at_every_n, model_of, training_step
from ..shared.options import DTYPES, Options
from ..shared.rows import Case, Row
from ..shared.tables import WAY, Table, case_tables, milliseconds, say, titled
from ..shared.ways import STOCK, TENSORS, run_in

TITLE = "Largest n that trains"
SMALL, QUICK_SMALL = 3000, 300
FILL, SHRINK, TRIES = 0.97, 0.92, 9
WORTH_IT = 1.02  # a larger n than one that trained is tried if it is larger by as much
ON_CPU = 0.05  # GiB: without a limit of its own, this is what is taken for full
WHOLE = "all"


def cases(options: Options) -> list[Case]:
    small = QUICK_SMALL if options.quick else SMALL
    budget = f"{options.memory[0]:g} GiB" if options.memory else WHOLE
    if not options.memory and torch.device(options.device).type != "cuda":
        budget = f"{ON_CPU:g} GiB"
    return [Case("largest", budget, n, D, dtype, options.device, kernel) for kernel, dtype, n in options.grid((small,))]


def _first_step(case: Case, way: str) -> tuple[float, float]:
    """Return the seconds of a step and its peak in n x n matrices."""
    step, seconds = run_in(way, training_step(model_of(case))), []
    held = peak.peak_bytes(lambda: seconds.append(timed(step, case.device)), case.device)
    return seconds[0], held / (case.n**2 * DTYPES[case.dtype].itemsize)


def _try(case: Case, way: str) -> tuple[float, float, str]:
    """Return what :func:`_first_step` does, and why there was none, or ""."""
    try:
        outcome = (*_first_step(case, way), "")
    except RuntimeError as error:  # out of memory, or a library that cannot take so many rows: both are the answer
        outcome = (0.0, 0.0, next(iter(str(error).splitlines()), type(error).__name__))
    release(case.device)
    return outcome


def search(
    first: int, attempt: Callable[[int], tuple[float, float, str]], room: Callable[[float], int]
) -> dict[str, Any]:
    """Return the largest n that trained among those tried, its seconds and peak, and what was refused.

    A large step may need fewer n x n matrices than the small one that the first n was found with: after one that
    trains, the n at which as many matrices as it needed fill the memory is tried. After one that does not, a smaller n.

    :param first: The first n to try.
    :param attempt: Tries an n: the seconds, the peak in n x n matrices, and why it did not train, or "".
    :param room: The n at which so many n x n matrices fill the memory.
    """
    found: dict[str, Any] = {"refused": {}}
    n = first
    for _ in range(TRIES):
        seconds, matrices, reason = attempt(n)
        if reason:
            found["refused"][str(n)] = reason
            n = math.floor(n * SHRINK)
        else:
            found |= {"largest": n, "seconds": seconds, "matrices": matrices}
            n = room(matrices)
        refused = min(map(int, found["refused"]), default=math.inf)
        if n >= refused or n <= found.get("largest", 0) * WORTH_IT:
            break
    return found


@dense_at_every_n()
def measure(case: Case, options: Options, advance: Advance) -> list[Row]:
    """Search for the largest n, both ways."""
    rows = []
    for way in (STOCK, TENSORS):
        _, matrices, reason = _try(case, way)
        if reason:
            say(f"largest, {case.dtype}: {way} does not even train at n = {case.n:,}: {reason}")
            continue
        asked = math.inf if case.case == WHOLE else float(case.case.split()[0]) * 2**30
        budget = FILL * min(available_bytes(case.device), asked) / DTYPES[case.dtype].itemsize

        def room(matrices: float, budget: float = budget) -> int:
            return math.floor(math.sqrt(budget / matrices))

        def attempt(n: int, way: str = way) -> tuple[float, float, str]:
            say(f"largest, {case.dtype}: {way} tries n = {n:,}.")
            return _try(replace(case, n=n), way)

        found = search(room(matrices), attempt, room)
        rows.append(Row(case, way, "step", p50=found.pop("seconds", None), values=found, **stamp(case.device)))
        advance(len(rows) / 2)
    return rows


COLUMNS = {
    "memory": lambda row, found: row.case.case,
    **WAY,
    "did not train": lambda row, found: ", ".join(f"{int(n):,}" for n in row.values["refused"]) or "-",
    "largest n that trained": lambda row, found: (
        f"{row.values['largest']:,}" if "largest" in row.values else "none of those tried"
    ),
    "its n x n matrices": lambda row, found: f"{row.values['matrices']:.2f}" if "matrices" in row.values else "-",
    "its step (ms)": lambda row, found: milliseconds(row.p50),
}


def tables(rows: list[Row]) -> list[Table]:
    caption = (
        f"The first n tried is the one at which the n x n matrices that a step at n = {rows[0].case.n:,} needs fill "
        f"{FILL:.0%} of the memory; after one that did not train comes one smaller by {1 - SHRINK:.0%}, after one that "
        "did the one that its own matrices allow. The step is the first at that n."
    )
    return case_tables(rows, titled(TITLE), COLUMNS, caption, ways=(STOCK, TENSORS))
