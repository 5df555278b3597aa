"""How much memory does a training step take at its peak, how much a prediction; which n is the largest that trains?"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

from ..shared import peak, plot
from ..shared.against_n import describe, file_name
from ..shared.compare import case_tables
from ..shared.machine import stamp
from ..shared.measuring import does_fit, fits
from ..shared.models import dense_at_every_n, model_of, test_points_of, training_step
from ..shared.options import DTYPES, Options
from ..shared.row import Case, Row
from ..shared.rows import by_case, by_provider, grouped, providers, setting
from ..shared.show import Table, mebibytes, say, software
from ..shared.ways import LOG_PROB, NO_COPY, STOCK, TENSORS, WAYS_CAPTION, run_in
from . import predict, train

TITLE = "Peak memory of a training step"
PREDICTION_TITLE = "Memory of a prediction"
PROVIDERS = (STOCK, NO_COPY, LOG_PROB, TENSORS)
STEP, PREDICTION = "step", "prediction"
TRAINED, ASKED = 500, (5000, 65536)  # training points, and test points, of the predictions
MIB = 2**20


def cases(options: Options) -> list[Case]:
    """Return one case for each kernel, data type and n, and one for each number of test points."""
    sizes = options.choose("sizes", (500, 1000, 2000, 3000), quick=(500, 1000))
    budgets = "GiB " + ",".join(f"{gib:g}" for gib in options.choose("memory", (8, 16, 32, 80)))
    steps = [
        Case("memory", "synthetic", n, train.D, dtype, options.device, kernel, settings=budgets)
        for kernel, dtype, n in options.grid(sizes)
    ]
    predictions = [
        Case("memory", PREDICTION, TRAINED, train.D, dtype, options.device, kernel, m=m, settings=options.effort)
        for kernel, dtype, m in options.grid(ASKED[-1:] if options.quick else ASKED)
    ]
    return steps + predictions


def measure(case: Case, options: Options, advance: Callable[[float], None]) -> list[Row]:
    """Count every allocation of a step, or of a prediction, after one that may fill caches."""
    return (_measure_prediction if case.case == PREDICTION else _measure_step)(case, advance)


def _measure_step(case: Case, advance: Callable[[float], None]) -> list[Row]:
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
            rows.append(Row(case, way, STEP, peak_memory=most, values=values, **stamp(case.device)))
            advance((done + 1) / len(PROVIDERS))
    return rows


def prediction(case: Case, way: str) -> Callable[[], object]:
    """Return a first call for mean and variance."""
    model, test_x = model_of(case).eval(), test_points_of(case)
    return run_in(way, lambda: predict.mean_and_variance(model, test_x))


def _measure_prediction(case: Case, advance: Callable[[float], None]) -> list[Row]:
    rows, ways = [], predict.ways_that_fit(case)
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


def _budgets(row: Row) -> list[float]:
    return [float(gib) for gib in row.case.settings.split()[1].split(",")]


def _largest_n(row: Row, gib: float) -> int:
    """Return the n at which the buffers that `row` counted fill `gib` GiB."""
    return math.floor(math.sqrt(gib * 2**30 / (row.values["buffers"] * DTYPES[row.case.dtype].itemsize)))


def _steps(rows: list[Row]) -> dict[tuple, list[Row]]:
    return grouped([row for row in rows if row.mode == STEP], setting)


def _prediction_lines(case: Case, found: dict[str, Row]) -> list[list[str]]:
    def resident(row: Row) -> list[str]:
        return [
            f"{row.values[name] / MIB:,.0f}" if name in row.values else "-" for name in ("resident_before", "resident")
        ]

    return [[f"{case.n:,}", f"{case.m:,}", way, mebibytes(row), *resident(row)] for way, row in found.items()]


def tables(rows: list[Row]) -> list[Table]:
    """Return the peaks at each n, the largest n in each of the budgets, and the memory of predictions."""
    made = []
    for group in _steps(rows).values():
        names = providers(group)
        lines = [
            [f"{case.n:,}", *(f"{found[name].values['buffers']:.2f}" for name in names)]
            for case, found in by_case(group).items()
        ]
        made.append(
            Table(
                f"{TITLE}, in n x n matrices: {describe(group[0])}",
                ["n", *names],
                lines,
                "Peak of what torch's allocator hands out during a step, and NumPy's on top; the work space inside "
                f"LAPACK is not seen. {WAYS_CAPTION}",
                software(group[0]),
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
    return made + case_tables(
        [row for row in rows if row.mode == PREDICTION],
        lambda row: f"{PREDICTION_TITLE}: {describe(row)}",
        ["n", "test points", "way", "tensors (MiB)", "process before (MiB)", "process at its peak (MiB)"],
        _prediction_lines,
        "First call for mean and variance. Tensors: peak of what torch's allocator hands out. Process: largest "
        "resident set of a fresh process, with its libraries and the model loaded, before and after the call. Stock is "
        "left out where there is no room for the joint covariance of all points, which it builds.",
    )


def pictures(rows: list[Row], folder: Path) -> list[Path]:
    """Plot the peak of a step against n, one picture for each kernel and data type."""
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
        for group in _steps(rows).values()
    ]
