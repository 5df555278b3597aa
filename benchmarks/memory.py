"""How much memory does a training step take at its peak, and which n is the largest that trains in a given memory?"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

from . import peak, plot, train
from .against_n import describe, file_name
from .machine import stamp
from .measuring import fits
from .models import dense_at_every_n, model_of, training_step
from .options import DTYPES, Options
from .row import Case, Row
from .rows import by_provider, grouped, providers, setting
from .show import Table, software
from .ways import LOG_PROB, NO_COPY, STOCK, TENSORS, WAYS_CAPTION, run_in

TITLE = "Peak memory of a training step"
PROVIDERS = (STOCK, NO_COPY, LOG_PROB, TENSORS)


def cases(options: Options) -> list[Case]:
    """Return one case for each kernel, data type and n."""
    sizes = options.choose("sizes", (500, 1000, 2000, 3000), quick=(500, 1000))
    budgets = ",".join(f"{gib:g}" for gib in options.choose("memory", (8, 16, 32, 80)))
    return [
        Case("memory", "synthetic", n, train.D, dtype, options.device, kernel, settings=f"GiB {budgets}")
        for kernel, dtype, n in options.grid(sizes)
    ]


def measure(case: Case, options: Options, advance: Callable[[float], None]) -> list[Row]:
    """Count every allocation of a step, after one that may fill caches."""
    if not fits(case, train.STOCK_MATRICES):
        return []
    rows = []
    with dense_at_every_n():
        for done, way in enumerate(PROVIDERS):
            step = run_in(way, training_step(model_of(case)))
            step()
            held = peak.trace_bytes(step, case.device)
            outside = peak.python_peak_bytes(step) if case.device == "cpu" else 0
            most = max(held) + outside
            values = {
                "buffers": most / (case.n**2 * DTYPES[case.dtype].itemsize),
                "held_after": held[-1],
                "outside_torch": outside,
            }
            rows.append(Row(case, way, "step", peak_memory=most, values=values, **stamp(case.device)))
            advance((done + 1) / len(PROVIDERS))
    return rows


def _budgets(row: Row) -> list[float]:
    return [float(gib) for gib in row.case.settings.split()[1].split(",")]


def _largest_n(row: Row, gib: float) -> int:
    """Return the n at which the buffers that `row` counted fill `gib` GiB."""
    return math.floor(math.sqrt(gib * 2**30 / (row.values["buffers"] * DTYPES[row.case.dtype].itemsize)))


def tables(rows: list[Row]) -> list[Table]:
    """Return the peaks at each n, and the largest n in each of the budgets."""
    made = []
    for group in grouped(rows, setting).values():
        names, lines = providers(group), []
        for case, together in grouped(group, lambda row: row.case).items():
            found = by_provider(together)
            lines.append([f"{case.n:,}", *(f"{found[name].values['buffers']:.2f}" for name in names)])
        made.append(
            Table(
                f"{TITLE}, in n x n matrices: {describe(group[0])}",
                ["n", *names],
                lines,
                "Peak of what torch's allocator hands out during a step, and NumPy's on top; the work space inside "
                f"LAPACK is not seen. {WAYS_CAPTION} {software(group[0])}.",
            )
        )
        largest = max(row.case.n for row in group)
        found = by_provider([row for row in group if row.case.n == largest])
        made.append(
            Table(
                f"Largest n that trains in a given memory, extrapolated: {describe(group[0])}",
                ["GiB", *names],
                [[f"{gib:g}", *(f"{_largest_n(found[name], gib):,}" for name in names)] for gib in _budgets(group[0])],
                f"Not tried: the number of n x n matrices at n = {largest:,} is taken to hold at every n.",
            )
        )
    return made


def pictures(rows: list[Row], folder: Path) -> list[Path]:
    """Plot the peak against n, one picture for each kernel and data type."""
    return [
        plot.curves(
            {
                "Peak memory (n x n matrices)": {
                    name: ([row.case.n for row in lines], [row.values["buffers"] for row in lines])
                    for name, lines in grouped(group, lambda row: row.provider).items()
                }
            },
            folder / file_name(group[0]),
            f"{TITLE}\n{describe(group[0])}",
            "Number of training points n",
            y_log=False,
        )
        for group in grouped(rows, setting).values()
    ]
