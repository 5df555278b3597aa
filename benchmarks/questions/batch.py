"""How long is a training step, and a prediction, of a batch of models?"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from ..shared.against_n import describe
from ..shared.agreement import check_same
from ..shared.compare import both_times, case_tables, dot_pictures
from ..shared.measuring import fits, rows_in_turn
from ..shared.models import dense_at_every_n, model_of, test_points_of
from ..shared.options import Options
from ..shared.row import Case, Row
from ..shared.rows import setting_and_mode
from ..shared.show import Table, ratio, times
from ..shared.timing import Variant
from ..shared.ways import LOG_PROB, STOCK, TENSORS, WAYS_CAPTION, run_in
from . import predict
from .train import STOCK_MATRICES, D, steps_that_agree

TITLE = "A batch of models"
BATCHES = (4, 16, 64)
TEST_POINTS = 10
STEP, PREDICTION = "training step", f"prediction of {TEST_POINTS} points each, later call"


def cases(options: Options) -> list[Case]:
    """Return one case for each data type, n and number of models."""
    return [
        Case("batch", "synthetic", n, D, dtype, options.device, kernel, batch, TEST_POINTS, options.effort)
        for kernel, dtype, n in options.grid(options.choose("sizes", (50, 100)))
        for batch in BATCHES
    ]


def measure(case: Case, options: Options, advance: Callable[[float], None]) -> list[Row]:
    """Time the step, then the prediction, in turn."""
    if not fits(case, STOCK_MATRICES):
        return []
    with dense_at_every_n():
        variants, values = steps_that_agree(case, (STOCK, LOG_PROB, TENSORS))
        rows = rows_in_turn(case, STEP, variants, options, lambda part: advance(part / 2), values)
        test_x = test_points_of(case)
        calls = {}
        for way in (STOCK, TENSORS):
            model = model_of(case).eval()
            calls[way] = run_in(way, lambda model=model: predict.mean_and_variance(model, test_x))
        check_same({way: call().double().cpu() for way, call in calls.items()}, case.dtype, f"{PREDICTION}, {case}")
        variants = {way: Variant(call) for way, call in calls.items()}
        return rows + rows_in_turn(case, PREDICTION, variants, options, lambda part: advance(0.5 + part / 2))


def _lines(case: Case, found: dict[str, Row]) -> list[list[str]]:
    stock = found[STOCK]
    ratios = [times(ratio(stock, found.get(way))) for way in (LOG_PROB, TENSORS)]
    return [[f"{case.batch}", f"{case.n:,}", *both_times(found), *ratios]]


def _title(row: Row) -> str:
    return f"{TITLE}, {row.mode}: {describe(row)}"


def tables(rows: list[Row]) -> list[Table]:
    """Return one table for each kernel, data type and mode."""
    columns = ["models", "n", "stock (ms)", "tensors (ms)", f"stock / {LOG_PROB}", "stock / tensors"]
    caption = f"Medians and [20 %, 80 %] quantiles, in turn. {WAYS_CAPTION}"
    return case_tables(rows, _title, columns, _lines, caption, key=setting_and_mode)


def pictures(rows: list[Row], folder: Path) -> list[Path]:
    """Plot times and ratios, one picture for each kernel, data type and mode."""
    return dot_pictures(
        rows,
        folder,
        _title,
        "Time",
        label=lambda row: f"{row.case.batch} models, n = {row.case.n:,}",
        key=setting_and_mode,
        part=lambda row: (row.mode.split()[0],),
    )
