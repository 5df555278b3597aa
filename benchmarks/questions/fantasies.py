"""How long does it take to make fantasies, a batch of models with a new point each, and how long their first query?"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from ..shared.against_n import describe
from ..shared.agreement import check_same
from ..shared.compare import both_times, case_tables, dot_pictures
from ..shared.measuring import fits, rows_in_turn
from ..shared.models import ExactGP, dense_at_every_n, model_of, sample_problem, test_points_of
from ..shared.options import DTYPES, Options
from ..shared.row import Case, Row
from ..shared.show import Table, mebibytes, ratio, times
from ..shared.timing import Variant
from ..shared.ways import STOCK, TENSORS, run_in
from .predict import mean_and_variance
from .train import D

TITLE = "Fantasies"
FANTASIES = 16
TEST_POINTS = 10
STOCK_MATRICES = 6 * FANTASIES  # at the peak of the query

MAKING, FIRST = f"making {FANTASIES} x 1 points", "their first query"


def cases(options: Options) -> list[Case]:
    """Return one case for each kernel, data type, n and task."""
    return [
        Case("fantasies", task, n, D, dtype, options.device, kernel, m=TEST_POINTS, settings=options.effort)
        for kernel, dtype, n in options.grid(options.choose("sizes", (100, 1000), quick=(100,)))
        for task in (MAKING, FIRST)
    ]


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


def measure(case: Case, options: Options, advance: Callable[[float], None]) -> list[Row]:
    """Time a task both ways, in turn, after a check that both ways' fantasies predict the same."""
    if not fits(case, STOCK_MATRICES):
        return []
    test_x = test_points_of(case)
    variants, results = {}, {}
    with dense_at_every_n():
        for way in (STOCK, TENSORS):
            make = maker_of(case, way)

            def query(made: ExactGP, way: str = way) -> torch.Tensor:
                return run_in(way, lambda: mean_and_variance(made, test_x))()

            variants[way] = Variant(make) if case.case == MAKING else _first_query(make, query)
            results[way] = query(make()).double().cpu()
        check_same(results, case.dtype, f"fantasies, {case.case}, n = {case.n}")
        return rows_in_turn(case, case.case, variants, options, advance)


def _lines(case: Case, found: dict[str, Row]) -> list[list[str]]:
    stock, tensors = found[STOCK], found[TENSORS]
    memory = [mebibytes(stock), mebibytes(tensors)]
    return [[case.case, f"{case.n:,}", *both_times(found), times(ratio(stock, tensors)), *memory]]


def _title(row: Row) -> str:
    return f"{TITLE}: {describe(row)}"


def tables(rows: list[Row]) -> list[Table]:
    """Return one table for each kernel and data type."""
    columns = ["task", "n", "stock (ms)", "tensors (ms)", "ratio", "stock (MiB)", "tensors (MiB)"]
    caption = (
        f"Making: `get_fantasy_model`, of a model that was asked before. Query: mean and variance of all {FANTASIES} "
        f"at {TEST_POINTS} points. MiB: peak memory. Medians and [20 %, 80 %] quantiles, in turn."
    )
    return case_tables(rows, _title, columns, _lines, caption)


def pictures(rows: list[Row], folder: Path) -> list[Path]:
    """Plot times and ratios, one picture for each kernel and data type."""
    return dot_pictures(rows, folder, _title, "Time", label=lambda row: f"{row.case.case}, n = {row.case.n:,}")
