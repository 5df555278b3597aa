"""How far is a training step from what this machine can do?

Three limits: the factorization alone (potrf + potri as torch has them); n^3 operations, which these take together, at
the rate of a matrix product of the same size; and the bytes of four n x n matrices (the covariance written, the factor
written, the inverse written and read) at the rate of a copy.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from ..shared import plot
from ..shared.against_n import describe, file_name
from ..shared.compare import case_tables
from ..shared.measuring import fits, rows_in_turn
from ..shared.models import dense_at_every_n
from ..shared.options import DTYPES, Options
from ..shared.row import Case, Row
from ..shared.rows import by_case, grouped, setting
from ..shared.show import Table, milliseconds, times
from ..shared.timing import Variant
from ..shared.ways import STOCK, TENSORS
from .train import FLOOR, STOCK_MATRICES, covariance_of, factorization, steps_that_agree
from .train import cases as training_cases

TITLE = "A training step over the machine's limits"
GEMM, COPY = "matrix product", "copy"
MATRICES_MOVED = 4
LIMITS = (FLOOR, "n^3 operations", "bytes")


def cases(options: Options) -> list[Case]:
    """Return the cases of `train`, with the RBF kernel if none was asked for."""
    return [case for case in training_cases(options, "limits") if case.kernel in options.choose("kernels", ("rbf",))]


def measure(case: Case, options: Options, advance: Callable[[float], None]) -> list[Row]:
    """Time a step both ways, the factorization, a matrix product and a copy, in turn."""
    if not fits(case, STOCK_MATRICES):
        return []
    with dense_at_every_n():
        variants, values = steps_that_agree(case, (STOCK, TENSORS))
        covariance = covariance_of(case)
        result = torch.empty_like(covariance)
        variants[FLOOR] = Variant(factorization(covariance))
        variants[GEMM] = Variant(lambda: torch.mm(covariance, covariance, out=result))
        variants[COPY] = Variant(lambda: result.copy_(covariance))
        return rows_in_turn(case, "step", variants, options, advance, values)


def limits(found: dict[str, Row]) -> dict[str, float]:
    """Return the limits in seconds.

    A product takes 2 n^3 operations, twice those of potrf and potri; a copy reads a matrix and writes one.
    """
    seconds = (found[FLOOR].p50, found[GEMM].p50 / 2, found[COPY].p50 * MATRICES_MOVED / 2)
    return dict(zip(LIMITS, seconds, strict=True))


def _lines(case: Case, found: dict[str, Row]) -> list[list[str]]:
    """Return the lines of one n: stock and tensors."""
    numbers = case.n**2 * DTYPES[case.dtype].itemsize
    operations_rate = f"{2 * case.n**3 / found[GEMM].p50 / 1e9:,.0f}"
    copy_rate = f"{2 * numbers / found[COPY].p50 / 1e9:.1f}"
    heads = {STOCK: f"{case.n:,}", TENSORS: ""}
    return [
        [
            head,
            way,
            milliseconds(found[way].p50),
            *(times(found[way].p50 / limit) for limit in limits(found).values()),
            *([operations_rate, copy_rate] if way == STOCK else ["", ""]),
        ]
        for way, head in heads.items()
    ]


def tables(rows: list[Row]) -> list[Table]:
    """Return one table for each kernel and data type."""
    return case_tables(
        rows,
        lambda row: f"{TITLE}: {describe(row)}",
        ["n", "way", "step (ms)", *(f"over {limit}" for limit in LIMITS), "product (GFLOP/s)", "copy (GB/s)"],
        _lines,
        f"{FLOOR}: torch.linalg.cholesky_ex and torch.cholesky_inverse. n^3 operations: at the rate of a matrix "
        f"product of that n. Bytes: of {MATRICES_MOVED} n x n matrices, at the rate of a copy. Medians, in turn.",
    )


def pictures(rows: list[Row], folder: Path) -> list[Path]:
    """Plot a step over the factorization alone against n, one picture for each kernel and data type."""
    paths = []
    for group in grouped(rows, setting).values():
        found = by_case(group)
        series = {
            f"{way} / {floor}": (
                [case.n for case in found],
                [named[way].p50 / limits(named)[floor] for named in found.values()],
            )
            for way in (STOCK, TENSORS)
            for floor in LIMITS[:2]
        }
        title = f"{TITLE}\n{describe(group[0])}"
        label = "Number of training points n"
        paths.append(plot.curves({"Time / limit": series}, folder / file_name(group[0]), title, label, y_log=True))
    return paths
