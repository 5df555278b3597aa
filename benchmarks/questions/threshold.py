"""Should I raise `max_cholesky_size`? A training step beyond it: stock's conjugate gradients against exact tensors.

Stock as it comes goes over to conjugate gradients beyond n = 800, which estimate the log determinant and its gradient
from a few random vectors. The other way raises the setting, with the flag on. Errors are against stock's Cholesky in
float64.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median

import torch

from ..shared.against_n import describe, time_pictures
from ..shared.agreement import distance
from ..shared.compare import both_times, case_tables, crossovers, gains_by_n
from ..shared.measuring import fits, rows_in_turn
from ..shared.models import EVERY_N, cholesky_up_to, loss_and_gradient, model_of, training_step
from ..shared.options import DTYPES, Options
from ..shared.row import Case, Row
from ..shared.rows import grouped, setting
from ..shared.show import Table, ratio, times
from ..shared.timing import Variant
from ..shared.ways import STOCK, TENSORS, run_in
from .train import STOCK_MATRICES, D

TITLE = "A step beyond max_cholesky_size"
UPSTREAM_LIMIT = 800  # upstream's default; importing BoTorch raises it
LIMITS = {STOCK: UPSTREAM_LIMIT, TENSORS: EVERY_N}
DRAWS = 5
ERRORS = ("loss", "gradient")


def cases(options: Options) -> list[Case]:
    """Return one case for each kernel, data type and n."""
    sizes = options.choose("sizes", (1000, 2000, 4000, 6000), quick=(1000, 2000))
    return [
        Case("threshold", "synthetic", n, D, dtype, options.device, kernel, settings=options.effort)
        for kernel, dtype, n in options.grid(sizes, tuple(DTYPES))
    ]


def _result(case: Case, way: str, limit: int, seed: int = 0) -> torch.Tensor:
    """Return loss and gradient of a step, whose random vectors are those of `seed`."""
    torch.manual_seed(seed)
    model = model_of(case)
    with cholesky_up_to(limit):
        return loss_and_gradient(model, run_in(way, training_step(model)))


def _errors(case: Case, way: str, exact: torch.Tensor) -> dict[str, float]:
    """Return the median relative errors of loss and gradient."""
    found = [_result(case, way, LIMITS[way], seed) for seed in range(DRAWS if way == STOCK else 1)]
    return {
        name: median(distance(result[part], exact[part]) for result in found)
        for name, part in zip(ERRORS, (slice(0, 1), slice(1, None)), strict=True)
    }


def measure(case: Case, options: Options, advance: Callable[[float], None]) -> list[Row]:
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


def _lines(case: Case, found: dict[str, Row]) -> list[list[str]]:
    errors = [f"{found[way].values[name]:.0e}" for name in ERRORS for way in LIMITS]
    return [[f"{case.n:,}", *both_times(found), times(ratio(found[STOCK], found[TENSORS])), *errors]]


def tables(rows: list[Row]) -> list[Table]:
    """Return one table for each kernel and data type."""
    return case_tables(
        sorted(rows, key=lambda row: row.case.n),
        lambda row: f"{TITLE}: {describe(row)}",
        ["n", "stock (ms)", "tensors (ms)", "ratio", *(f"{name} error, {way}" for name in ERRORS for way in LIMITS)],
        _lines,
        f"Stock with its default, max_cholesky_size = {UPSTREAM_LIMIT}: conjugate gradients; tensors: the flag on and "
        "max_cholesky_size raised. Medians and [20 %, 80 %] quantiles, in turn. Errors: relative to Cholesky in "
        f"float64; of stock the median of {DRAWS} draws of its random vectors.",
    )


def pictures(rows: list[Row], folder: Path) -> list[Path]:
    """Plot time and ratio against n, one picture for each kernel and data type."""
    return time_pictures(rows, folder, TITLE, "Time of a training step")


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
