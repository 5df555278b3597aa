"""How long does it take to make fantasies, a batch of models with a new point each, and how long their first query?"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch

from ..shared.measuring import Advance, Variant, cases_of, check_same, rows_in_turn, with_room
from ..shared.models import ExactGP, mean_and_variance, model_of, sample_problem, test_points_of
from ..shared.options import DTYPES, Options
from ..shared.pictures import dot_pictures
from ..shared.rows import Case, Row
from ..shared.tables import IN_TURN, MEMORY, TIMES_AND_RATIO, N, case_tables, titled
from ..shared.ways import STOCK, TENSORS, run_in

TITLE = "Fantasies"
FANTASIES = 16
TEST_POINTS = 10
MAKING, FIRST = f"making {FANTASIES} x 1 points", "their first query"


def cases(options: Options) -> list[Case]:
    made = cases_of("fantasies", options, (100, 1000), quick=(100,), m=TEST_POINTS)
    return [replace(case, case=task) for case in made for task in (MAKING, FIRST)]


def maker_of(case: Case, way: str) -> Callable[[], ExactGP]:
    """Return what makes fantasies, again and again, of a model that was asked before."""
    x, y = sample_problem(FANTASIES, case.d, DTYPES[case.dtype], case.device, seed=2)
    model = model_of(case).eval()
    run_in(way, lambda: mean_and_variance(model, test_points_of(case)))()

    def make() -> ExactGP:
        with torch.no_grad():
            return model.get_fantasy_model(x.unsqueeze(-2), y.unsqueeze(-1))

    return run_in(way, make)


def _first_query(make: Callable[[], ExactGP], query: Callable[[ExactGP], torch.Tensor]) -> Variant:
    made: list[ExactGP] = []

    def prepare() -> None:
        made[:] = [make()]

    return Variant(lambda: query(made[0]), prepare)


@with_room(6 * FANTASIES)  # at the peak of the query
def measure(case: Case, options: Options, advance: Advance) -> list[Row]:
    """Time a task both ways, in turn, after a check that both ways' fantasies predict the same."""
    test_x = test_points_of(case)
    variants, results = {}, {}
    for way in (STOCK, TENSORS):
        make = maker_of(case, way)

        def query(made: ExactGP, way: str = way) -> torch.Tensor:
            return run_in(way, lambda: mean_and_variance(made, test_x))()

        variants[way] = Variant(make) if case.case == MAKING else _first_query(make, query)
        results[way] = query(make()).double().cpu()
    check_same(results, case.dtype, f"fantasies, {case.case}, n = {case.n}")
    return rows_in_turn(case, case.case, variants, options, advance)


tables = partial(
    case_tables,
    title=titled(TITLE),
    columns={"task": lambda row, found: row.case.case} | N | TIMES_AND_RATIO | MEMORY,
    caption=f"Making: `get_fantasy_model`, of a model that was asked before. Query: mean and variance of all "
    f"{FANTASIES} at {TEST_POINTS} points. MiB: peak memory. {IN_TURN}",
)
pictures = partial(
    dot_pictures, title=titled(TITLE), what="Time", label=lambda row: f"{row.case.case}, n = {row.case.n:,}"
)
