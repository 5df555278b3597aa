"""How far is a training step from what this machine can do?

Three limits: the factorization alone (potrf + potri as torch has them); n^3 operations, which these take together, at
the rate of a matrix product of the same size; and the bytes of four n x n matrices (the covariance written, the factor
written, the inverse written and read) at the rate of a copy.
"""

from __future__ import annotations

from functools import partial

import torch

from ..shared.measuring import Advance, Variant, rows_in_turn, with_room
from ..shared.options import DTYPES, Options
from ..shared.pictures import Curve, Panel, curve_pictures
from ..shared.rows import Case, Found, Row, by_case
from ..shared.tables import WAY, case_tables, describe, milliseconds, once, times, titled
from ..shared.ways import STOCK, TENSORS
from .train import FLOOR, covariance_of, factorization, steps_that_agree
from .train import cases as training_cases

TITLE = "A training step over the machine's limits"
GEMM, COPY = "matrix product", "copy"
MATRICES_MOVED = 4
LIMITS = (FLOOR, "n^3 operations", "bytes")


def cases(options: Options) -> list[Case]:
    return [case for case in training_cases(options, "limits") if case.kernel in options.choose("kernels", ("rbf",))]


@with_room()
def measure(case: Case, options: Options, advance: Advance) -> list[Row]:
    """Time a step both ways, the factorization, a matrix product and a copy, in turn."""
    variants, values = steps_that_agree(case, (STOCK, TENSORS))
    covariance = covariance_of(case)
    result = torch.empty_like(covariance)
    variants[FLOOR] = Variant(factorization(covariance))
    variants[GEMM] = Variant(lambda: torch.mm(covariance, covariance, out=result))
    variants[COPY] = Variant(lambda: result.copy_(covariance))
    return rows_in_turn(case, "step", variants, options, advance, values)


def limits(found: Found) -> dict[str, float]:
    """Return the limits in seconds.

    A product takes 2 n^3 operations, twice those of potrf and potri; a copy reads a matrix and writes one.
    """
    seconds = (found[FLOOR].p50, found[GEMM].p50 / 2, found[COPY].p50 * MATRICES_MOVED / 2)
    return dict(zip(LIMITS, seconds, strict=True))


COLUMNS = {
    "n": once(lambda row, found: f"{row.case.n:,}"),
    **WAY,
    "step (ms)": lambda row, found: milliseconds(row.p50),
    **{f"over {limit}": lambda row, found, limit=limit: times(row.p50 / limits(found)[limit]) for limit in LIMITS},
    "product (GFLOP/s)": once(lambda row, found: f"{2 * row.case.n**3 / found[GEMM].p50 / 1e9:,.0f}"),
    "copy (GB/s)": once(
        lambda row, found: f"{2 * row.case.n**2 * DTYPES[row.case.dtype].itemsize / found[COPY].p50 / 1e9:.1f}"
    ),
}

tables = partial(
    case_tables,
    title=titled(TITLE),
    columns=COLUMNS,
    caption=f"{FLOOR}: torch.linalg.cholesky_ex and torch.cholesky_inverse. n^3 operations: at the rate of a matrix "
    f"product of that n. Bytes: of {MATRICES_MOVED} n x n matrices, at the rate of a copy. Medians, in turn.",
    ways=(STOCK, TENSORS),
)


def _panels(rows: list[Row]) -> list[Panel]:
    found = by_case(rows)
    sizes = [case.n for case in found]
    over = {
        f"{way} / {limit}": Curve(sizes, [named[way].p50 / limits(named)[limit] for named in found.values()])
        for way in (STOCK, TENSORS)
        for limit in LIMITS[:2]
    }
    return [Panel("Time / limit", over)]


pictures = partial(curve_pictures, title=lambda row: f"{TITLE}\n{describe(row)}", panels=_panels)
