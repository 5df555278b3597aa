"""How long is a training step (zero_grad, forward, backward), against n?

Four ways to run the same code of the user's, and the factorization alone: the least that has to be done. At sizes where
page faults tell on CPU, once more in a process that has freed larger matrices before and takes none.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from ..shared.measuring import (
    STOCK_MATRICES,
    Advance,
    Variant,
    cases_of,
    check_same,
    fits,
    noted,
    rows_in_turn,
    steps_in,
)
from ..shared.models import dense_at_every_n, model_of
from ..shared.options import DTYPES, Options
from ..shared.pictures import time_pictures
from ..shared.rows import Case, Row, grouped
from ..shared.tables import Table, ratio_tables, titled
from ..shared.ways import LOG_PROB, NO_COPY, STOCK, TENSORS, WAYS_CAPTION, takes_tensors

TITLE = "Time of a training step"
PROVIDERS = (STOCK, NO_COPY, LOG_PROB, TENSORS)
FLOOR = "potrf + potri"
SYNTHETIC, FREED = "synthetic", "larger matrices freed before"
FREED_SIZES, FREED_BYTES = range(200, 1000), 30 * 2**20
# n x n matrices to have room for; one of them is what the factorization alone is given.
MATRICES = {STOCK: STOCK_MATRICES, NO_COPY: STOCK_MATRICES, LOG_PROB: 9, TENSORS: 5}


def cases(options: Options, question: str = "train") -> list[Case]:
    sizes, quick = (20, 50, 100, 200, 500, 1000, 2000, 4000), (20, 100, 500, 1000)
    made = cases_of(question, options, sizes, quick, tuple(DTYPES), ("rbf",) if options.quick else ("rbf", "matern"))
    if question == "train" and options.device == "cpu" and not options.quick:
        made += [replace(case, case=FREED) for case in made if case.n in FREED_SIZES and case.kernel == "rbf"]
    return made


def factorization(covariance: torch.Tensor) -> Callable[[], torch.Tensor]:
    """Return what no training step can do without: Cholesky's factor and the inverse made of it."""
    return lambda: torch.cholesky_inverse(torch.linalg.cholesky_ex(covariance)[0])


def steps_that_agree(case: Case, ways: tuple[str, ...]) -> tuple[dict[str, Variant], dict[str, dict[str, float]]]:
    """Return a training step in each of the ways, after a check that loss and gradient agree, and their distances."""
    variants, results = steps_in(ways, partial(model_of, case))
    if TENSORS in ways and not takes_tensors(variants[TENSORS].run):
        raise RuntimeError(f"The flag was on, and the training step of {case} did not take the tensor path.")
    distances = check_same(results, case.dtype, f"loss and gradient, {case.kernel}, n = {case.n}")
    return variants, noted(distances) if STOCK in ways else {}


def covariance_of(case: Case) -> torch.Tensor:
    """Return the covariance that the training steps of `case` factorize."""
    model = model_of(case)
    with torch.no_grad():
        return model.likelihood(model(*model.train_inputs)).covariance_matrix


def measure(case: Case, options: Options, advance: Advance) -> list[Row]:
    """Time a step in every way that there is memory for, and the factorization alone, in turn."""
    ways = tuple(way for way in PROVIDERS if fits(case, MATRICES[way], way))
    if not ways:
        return []
    if case.case == FREED:
        for _ in range(3):
            torch.zeros(FREED_BYTES, dtype=torch.uint8)
    with dense_at_every_n():
        variants, values = steps_that_agree(case, ways)
        variants[FLOOR] = Variant(factorization(covariance_of(case)))
        return rows_in_turn(case, "step", variants, options, advance, values)


def tables(rows: list[Row]) -> list[Table]:
    caption = f"{WAYS_CAPTION} '{NO_COPY}': without `.contiguous()` after Cholesky. {FLOOR}: the factorization alone."
    titles = {SYNTHETIC: TITLE, FREED: f"{TITLE}, {FREED}"}
    return [
        table
        for name, group in grouped(rows, lambda row: row.case.case).items()
        for table in ratio_tables(group, titles[name], caption, (STOCK, TENSORS), floor=FLOOR)
    ]


def pictures(rows: list[Row], folder: Path) -> list[Path]:
    """Plot what had no matrices freed before it."""
    rows = [row for row in rows if row.case.case == SYNTHETIC]
    return time_pictures(rows, folder, titled(TITLE), TITLE, floor=FLOOR)
