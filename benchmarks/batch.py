"""How long is a training step, and a prediction, of a batch of models?"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from . import plot, predict
from .against_n import describe, file_name
from .agreement import check_same
from .measuring import fits, rows_in_turn
from .models import dense_at_every_n, make_model, sample_problem
from .options import DTYPES, Options
from .row import Case, Row
from .rows import by_provider, grouped, setting
from .show import Table, ratio, software, time_with_spread, times
from .timing import Variant
from .train import STOCK_MATRICES, D, steps_that_agree
from .ways import LOG_PROB, STOCK, TENSORS, WAYS_CAPTION, run_in

TITLE = "A batch of models"
BATCHES = (4, 16, 64)
TEST_POINTS = 10
STEP, PREDICTION = "training step", f"prediction of {TEST_POINTS} points each, later call"


def cases(options: Options) -> list[Case]:
    """Return one case for each data type, n and number of models."""
    return [
        Case("batch", "synthetic", n, D, dtype, options.device, kernel, batch, TEST_POINTS, options.effort)
        for kernel in options.choose("kernels", ("rbf",))
        for dtype in options.choose("dtypes", ("float64",))
        for n in options.choose("sizes", (50, 100))
        for batch in BATCHES
    ]


def measure(case: Case, options: Options, advance: Callable[[float], None]) -> list[Row]:
    """Time the step, then the prediction, in turn."""
    if not fits(case, STOCK_MATRICES):
        return []
    problem = (case.d, DTYPES[case.dtype], case.device, case.batch)
    with dense_at_every_n():
        variants, values = steps_that_agree(case, (STOCK, LOG_PROB, TENSORS))
        rows = rows_in_turn(case, STEP, variants, options, lambda part: advance(part / 2), values)
        test_x, _ = sample_problem(case.m, *problem, seed=1)
        calls = {}
        for way in (STOCK, TENSORS):
            model = make_model(*sample_problem(case.n, *problem), case.kernel).eval()
            calls[way] = run_in(way, lambda model=model: predict.mean_and_variance(model, test_x))
        check_same({way: call().double().cpu() for way, call in calls.items()}, case.dtype, f"{PREDICTION}, {case}")
        variants = {way: Variant(call) for way, call in calls.items()}
        return rows + rows_in_turn(case, PREDICTION, variants, options, lambda part: advance(0.5 + part / 2))


def tables(rows: list[Row]) -> list[Table]:
    """Return one table for each kernel, data type and mode."""
    made = []
    for group in grouped(rows, lambda row: (*setting(row), row.mode)).values():
        lines = []
        for case, together in grouped(group, lambda row: row.case).items():
            found = by_provider(together)
            stock, tensors, log_prob = found[STOCK], found[TENSORS], found.get(LOG_PROB)
            line = [f"{case.batch}", f"{case.n:,}", time_with_spread(stock), time_with_spread(tensors)]
            lines.append([*line, times(ratio(stock, log_prob)), times(ratio(stock, tensors))])
        columns = ["models", "n", "stock (ms)", "tensors (ms)", f"stock / {LOG_PROB}", "stock / tensors"]
        title = f"{TITLE}, {group[0].mode}: {describe(group[0])}"
        caption = f"Medians and [20 %, 80 %] quantiles, in turn. {WAYS_CAPTION} {software(group[0])}."
        made.append(Table(title, columns, lines, caption))
    return made


def pictures(rows: list[Row], folder: Path) -> list[Path]:
    """Plot times and ratios, one picture for each kernel, data type and mode."""
    return [
        plot.dots(
            group,
            base=STOCK,
            path=folder / file_name(group[0], group[0].mode.split()[0]),
            title=f"{TITLE}, {group[0].mode}: {describe(group[0])}",
            what="Time",
            label=lambda row: f"{row.case.batch} models, n = {row.case.n:,}",
        )
        for group in grouped(rows, lambda row: (*setting(row), row.mode)).values()
    ]
