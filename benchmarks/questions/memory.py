"""How much memory does a training step take at its peak, how much a prediction; which n is the largest that trains?"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path

from ..shared import peak
from ..shared.machine import stamp
from ..shared.measuring import Advance, cases_of, does_fit, with_room
from ..shared.models import D, mean_and_variance, model_of, test_points_of, training_step
from ..shared.options import DTYPES, Options
from ..shared.pictures import Curve, Panel, curve_pictures
from ..shared.rows import Case, Found, Row, by_provider, grouped, setting
from ..shared.tables import WAY, Cell, N, Table, case_tables, describe, mebibytes, say, titled
from ..shared.ways import LOG_PROB, NO_COPY, STOCK, TENSORS, WAYS_CAPTION, run_in
from .predict import ways_that_fit

TITLE = "Peak memory of a training step"
PREDICTION_TITLE = "Memory of a prediction"
PROVIDERS = (STOCK, NO_COPY, LOG_PROB, TENSORS)
STEP, PREDICTION = "step", "prediction"
TRAINED, ASKED = 500, (5000, 65536)  # training points, and test points, of the predictions


def cases(options: Options) -> list[Case]:
    budgets = "GiB " + ",".join(f"{gib:g}" for gib in options.choose("memory", (8, 16, 32, 80)))
    steps = cases_of("memory", options, (500, 1000, 2000, 3000), quick=(500, 1000), settings=budgets)
    predictions = [
        Case("memory", PREDICTION, TRAINED, D, dtype, options.device, kernel, m=m, settings=options.effort)
        for kernel, dtype, m in options.grid(ASKED[-1:] if options.quick else ASKED)
    ]
    return steps + predictions


def measure(case: Case, options: Options, advance: Advance) -> list[Row]:
    """Count every allocation of a step, or of a prediction, after one that may fill caches."""
    return (_measure_prediction if case.case == PREDICTION else _measure_step)(case, options, advance)


@with_room()
def _measure_step(case: Case, options: Options, advance: Advance) -> list[Row]:
    rows = []
    for way in PROVIDERS:
        step = run_in(way, training_step(model_of(case)))
        step()
        held = peak.trace_bytes(step, case.device)
        outside = peak.python_peak_bytes(step) if case.device == "cpu" else 0
        most = max(held) + outside
        buffers = most / (case.n**2 * DTYPES[case.dtype].itemsize)
        values = {"buffers": buffers, "held_after": held[-1], "outside_torch": outside}
        rows.append(Row(case, way, STEP, peak_memory=most, values=values, **stamp(case.device)))
        advance(len(rows) / len(PROVIDERS))
    return rows


def prediction(case: Case, way: str) -> Callable[[], object]:
    """Return a first call for mean and variance."""
    return run_in(way, partial(mean_and_variance, model_of(case).eval(), test_points_of(case)))


def _measure_prediction(case: Case, options: Options, advance: Advance) -> list[Row]:
    rows, ways = [], ways_that_fit(case)
    for done, way in enumerate(ways):
        if not does_fit(prediction(case, way)):
            say(f"memory, n = {case.n:,}, {case.m:,} test points: {way} ran out of memory.")
            continue
        allocated = peak.peak_bytes(prediction(case, way), case.device)
        resident = peak.resident_peaks(prediction, case, way) if case.device == "cpu" else None
        values = dict(zip(("resident_before", "resident"), resident, strict=True)) if resident else {}
        rows.append(Row(case, way, PREDICTION, peak_memory=allocated, values=values, **stamp(case.device)))
        advance((done + 1) / len(ways))
    return rows


def _largest_n(row: Row, gib: float) -> int:
    """Return the n at which the buffers that `row` counted fill `gib` GiB."""
    return math.floor(math.sqrt(gib * 2**30 / (row.values["buffers"] * DTYPES[row.case.dtype].itemsize)))


def _resident(name: str) -> Cell:
    return lambda row, found: f"{row.values[name] / 2**20:,.0f}" if name in row.values else "-"


def tables(rows: list[Row]) -> list[Table]:
    """Return the peaks at each n, the largest n in each of the budgets, and the memory of predictions."""
    made = []
    for group in grouped([row for row in rows if row.mode == STEP], setting).values():
        names = list(by_provider(group))
        made += case_tables(
            group,
            lambda row: f"{TITLE}, in n x n matrices: {describe(row)}",
            N | {name: lambda row, found, name=name: f"{found[name].values['buffers']:.2f}" for name in names},
            "Peak of what torch's allocator hands out during a step, and NumPy's on top; the work space inside "
            f"LAPACK is not seen. {WAYS_CAPTION}",
        )
        largest = max(row.case.n for row in group)
        budgets = [float(gib) for gib in group[0].case.settings.split()[1].split(",")]
        found: Found = {row.provider: row for row in group if row.case.n == largest}
        made.append(
            Table(
                f"Largest n that trains in a given memory, extrapolated: {describe(group[0])}",
                ["GiB", *names],
                [[f"{gib:g}", *(f"{_largest_n(found[name], gib):,}" for name in names)] for gib in budgets],
                f"Not tried: the number of n x n matrices at n = {largest:,} is taken to hold at every n.",
            )
        )
    return made + case_tables(
        [row for row in rows if row.mode == PREDICTION],
        titled(PREDICTION_TITLE),
        N
        | {"test points": lambda row, found: f"{row.case.m:,}"}
        | WAY
        | {
            "tensors (MiB)": lambda row, found: mebibytes(row),
            "process before (MiB)": _resident("resident_before"),
            "process at its peak (MiB)": _resident("resident"),
        },
        "First call for mean and variance. Tensors: peak of what torch's allocator hands out. Process: largest "
        "resident set of a fresh process, with its libraries and the model loaded, before and after the call. Stock is "
        "left out where there is no room for the joint covariance of all points, which it builds.",
        ways=PROVIDERS,
    )


def pictures(rows: list[Row], folder: Path) -> list[Path]:
    def panels(group: list[Row]) -> list[Panel]:
        buffers = {
            name: Curve([row.case.n for row in lines], [row.values["buffers"] for row in lines])
            for name, lines in by_provider(group).items()
        }
        return [Panel("Peak memory (n x n matrices)", buffers, is_log=False)]

    steps = [row for row in rows if row.mode == STEP]
    return curve_pictures(steps, folder, lambda row: f"{TITLE}\n{describe(row)}", panels)
