"""How long is a training step, and a prediction, of a batch of models?"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from ..shared.measuring import Advance, Variant, cases_of, check_same, rows_in_turn, with_room
from ..shared.models import mean_and_variance, model_of, test_points_of
from ..shared.options import Options
from ..shared.pictures import dot_pictures
from ..shared.rows import Case, Row, setting_and_mode
from ..shared.tables import IN_TURN, TIMES, N, case_tables, over, titled
from ..shared.ways import LOG_PROB, STOCK, TENSORS, WAYS_CAPTION, run_in
from .train import steps_that_agree

TITLE = "A batch of models"
BATCHES = (4, 16, 64)
TEST_POINTS = 10
STEP, PREDICTION = "training step", f"prediction of {TEST_POINTS} points each, later call"


def cases(options: Options) -> list[Case]:
    made = cases_of("batch", options, (50, 100), m=TEST_POINTS)
    return [replace(case, batch=batch) for case in made for batch in BATCHES]


@with_room()
def measure(case: Case, options: Options, advance: Advance) -> list[Row]:
    """Time the step, then the prediction, in turn."""
    variants, values = steps_that_agree(case, (STOCK, LOG_PROB, TENSORS))
    rows = rows_in_turn(case, STEP, variants, options, lambda part: advance(part / 2), values)
    test_x = test_points_of(case)
    calls = {way: run_in(way, partial(mean_and_variance, model_of(case).eval(), test_x)) for way in (STOCK, TENSORS)}
    check_same({way: call().double().cpu() for way, call in calls.items()}, case.dtype, f"{PREDICTION}, {case}")
    variants = {way: Variant(call) for way, call in calls.items()}
    return rows + rows_in_turn(case, PREDICTION, variants, options, lambda part: advance(0.5 + part / 2))


tables = partial(
    case_tables,
    title=titled(TITLE, with_mode=True),
    columns={"models": lambda row, found: f"{row.case.batch}"}
    | N
    | TIMES
    | {f"stock / {LOG_PROB}": over(STOCK, LOG_PROB), "stock / tensors": over(STOCK, TENSORS)},
    caption=f"{IN_TURN} {WAYS_CAPTION}",
    key=setting_and_mode,
)
pictures = partial(
    dot_pictures,
    title=titled(TITLE, with_mode=True),
    what="Time",
    label=lambda row: f"{row.case.batch} models, n = {row.case.n:,}",
    key=setting_and_mode,
    part=lambda row: (row.mode.split()[0],),
)
