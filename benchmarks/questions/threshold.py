"""Should I raise `max_cholesky_size`? A training step beyond it: stock's conjugate gradients against exact tensors.

Stock as it comes goes over to conjugate gradients beyond n = 800, which estimate the log determinant and its gradient
from a few random vectors. The other way raises the setting, with the flag on. Errors are against stock's Cholesky in
float64.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from statistics import median

import torch

from ..shared.measuring import STOCK_MATRICES, Advance, Variant, cases_of, distance, fits, rows_in_turn
from ..shared.models import EVERY_N, cholesky_up_to, loss_and_gradient, model_of, training_step
from ..shared.options import DTYPES, Options
from ..shared.pictures import time_pictures
from ..shared.rows import Case, Row, grouped, setting
from ..shared.tables import IN_TURN, TIMES_AND_RATIO, N, Table, case_tables, crossovers, describe, gains_by_n, titled
from ..shared.ways import STOCK, TENSORS, run_in

TITLE = "A step beyond max_cholesky_size"
UPSTREAM_LIMIT = 800  # upstream's default; importing BoTorch raises it
LIMITS = {STOCK: UPSTREAM_LIMIT, TENSORS: EVERY_N}
DRAWS = 5
ERRORS = {"loss": slice(0, 1), "gradient": slice(1, None)}

cases = partial(cases_of, "threshold", sizes=(1000, 2000, 4000, 6000), quick=(1000, 2000), dtypes=tuple(DTYPES))


def _result(case: Case, way: str, limit: int, seed: int = 0) -> torch.Tensor:
    """Return loss and gradient of a step, whose random vectors are those of `seed`."""
    torch.manual_seed(seed)
    model = model_of(case)
    with cholesky_up_to(limit):
        return loss_and_gradient(model, run_in(way, training_step(model)))


def _errors(case: Case, way: str, exact: torch.Tensor) -> dict[str, float]:
    """Return the median relative errors of loss and gradient."""
    found = [_result(case, way, LIMITS[way], seed) for seed in range(DRAWS if way == STOCK else 1)]
    return {name: median(distance(result[part], exact[part]) for result in found) for name, part in ERRORS.items()}


def measure(case: Case, options: Options, advance: Advance) -> list[Row]:
    """Time a step both ways, in turn, and compare its numbers with the exact ones."""
    in_float64 = replace(case, dtype="float64")
    if not fits(in_float64, STOCK_MATRICES):
        return []
    exact = _result(in_float64, STOCK, EVERY_N)
    values = {way: _errors(case, way, exact) for way in LIMITS}

    def run(way: str, step: Callable[[], object]) -> None:
        with cholesky_up_to(LIMITS[way]):
            step()

    variants = {way: Variant(partial(run, way, run_in(way, training_step(model_of(case))))) for way in LIMITS}
    return rows_in_turn(case, "step", variants, options, advance, values, least=3)


def tables(rows: list[Row]) -> list[Table]:
    errors = {
        f"{name} error, {way}": lambda row, found, name=name, way=way: f"{found[way].values[name]:.0e}"
        for name in ERRORS
        for way in LIMITS
    }
    return case_tables(
        sorted(rows, key=lambda row: row.case.n),
        titled(TITLE),
        N | TIMES_AND_RATIO | errors,
        f"Stock with its default, max_cholesky_size = {UPSTREAM_LIMIT}: conjugate gradients; tensors: the flag on and "
        f"max_cholesky_size raised. {IN_TURN} Errors: relative to Cholesky in float64; of stock the median of {DRAWS} "
        "draws of its random vectors.",
    )


pictures = partial(time_pictures, title=titled(TITLE), what="Time of a training step")


def remarks(rows: list[Row]) -> list[str]:
    """Return for each kernel and data type up to which n raising the setting pays."""
    said = []
    for group in grouped(rows, setting).values():
        gains = gains_by_n(group)
        pays = [n for n, gain in gains if gain > 1]
        largest = f"up to n = {max(pays):,}" if pays else "at none"
        said.append(
            f"{describe(group[0])}: of the n tried, raising max_cholesky_size makes a step faster {largest}. "
            f"{crossovers(gains)}"
        )
    return said
