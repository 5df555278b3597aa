"""Which way from a Cholesky factor to the inverse is the fastest?

`torch.cholesky_inverse` against two triangular solves, against the inverse of the factor times itself, which may be put
together by products from the inverses of the blocks on its diagonal, and against the blocked inverse of this package,
from several block sizes on.
"""

from __future__ import annotations

import math
from functools import partial
from importlib import import_module
from unittest import mock

import torch

from ..shared.measuring import Advance, Variant, cases_of, check_same, noted, rows_in_turn, with_room
from ..shared.options import DTYPES, Options
from ..shared.pictures import time_pictures
from ..shared.rows import Case, Row, by_case, by_provider, grouped, setting
from ..shared.tables import listed, listed_n, ratio_tables, titled
from .train import covariance_of

blocked = import_module("gpytorch.functions.cholesky_inverse")

TITLE = "Inverse from a Cholesky factor"
TORCH, SOLVES, PRODUCT = "cholesky_inverse", "two triangular solves", "inverse of the factor, squared"
DOUBLED = "the same, by products"
BLOCKS = (128, 256, 512, 1024, 2048)

cases = partial(cases_of, "inverse", sizes=(50, 200, 500, 1000, 2000, 4000), quick=(50, 200, 500), dtypes=tuple(DTYPES))


def _blocked(work: torch.Tensor, size: int) -> torch.Tensor:
    with mock.patch.multiple(blocked, _BLOCKED_FROM=size, _PRODUCT_ON_CUDA_UP_TO=size - 1):
        return blocked.cholesky_inverse_(work)


def _on_diagonal(matrix: torch.Tensor, size: int) -> torch.Tensor:
    """Return a view of the blocks of so many rows on the diagonal (N / size x size x size)."""
    return matrix.unflatten(-1, (-1, size)).unflatten(0, (-1, size)).diagonal(0, 0, 2).movedim(-1, 0)


def _doubled(factor: torch.Tensor, rows: int = 256) -> torch.Tensor:
    """Return the inverse of a factor L.

    The inverse of [[A, 0], [B, C]] is [[A^-1, 0], [-C^-1 B A^-1, C^-1]]: from the inverses of all blocks of so many
    rows on the diagonal come those of all of twice the size, by two batched products.
    """
    n, number = len(factor), 2 ** max(0, math.ceil(math.log2(len(factor) / rows)))
    size = math.ceil(n / number)
    padded = torch.eye(size * number, dtype=factor.dtype, device=factor.device)
    padded[:n, :n] = factor
    unit = torch.eye(size, dtype=factor.dtype, device=factor.device)
    inverse = torch.zeros_like(padded)
    _on_diagonal(inverse, size)[:] = torch.linalg.solve_triangular(_on_diagonal(padded, size), unit, upper=False)
    while size < len(padded):
        left, right = _on_diagonal(inverse, size).unflatten(0, (-1, 2)).unbind(1)
        lower = _on_diagonal(padded, 2 * size)[:, size:, :size]
        _on_diagonal(inverse, 2 * size)[:, size:, :size] = -(right @ lower @ left)
        size *= 2
    return inverse[:n, :n]


@with_room()
def measure(case: Case, options: Options, advance: Advance) -> list[Row]:
    """Time all ways in turn, after a check that they find the same inverse."""
    factor = torch.linalg.cholesky(covariance_of(case))
    identity = torch.eye(case.n, dtype=factor.dtype, device=factor.device)
    work = torch.empty_like(factor.mT).mT  # in LAPACK's order, as a training step has it

    def half() -> torch.Tensor:
        return torch.linalg.solve_triangular(factor, identity, upper=False)

    def squared(inverse: torch.Tensor) -> torch.Tensor:
        return inverse.mT @ inverse

    variants = {
        TORCH: Variant(lambda: torch.cholesky_inverse(factor)),
        SOLVES: Variant(lambda: torch.linalg.solve_triangular(factor.mT, half(), upper=True)),
        PRODUCT: Variant(lambda: squared(half())),
        DOUBLED: Variant(lambda: squared(_doubled(factor))),
    } | {
        f"blocks from {size}": Variant(partial(_blocked, work, size), prepare=lambda: work.copy_(factor))
        for size in BLOCKS
        if size <= case.n
    }
    # Compared by what they do to a few vectors: on a GPU the inverses themselves would fill the CPU's memory.
    probes = torch.linspace(-1, 1, 4 * case.n, dtype=factor.dtype, device=factor.device).sin().view(case.n, 4)
    results = {}
    for name, variant in variants.items():
        variant.prepare()
        results[name] = (variant.run() @ probes).double().cpu().reshape(-1)
    distances = check_same(results, case.dtype, f"inverse, n = {case.n}")
    return rows_in_turn(case, "inverse", variants, options, advance, noted(distances), with_memory=False)


tables = partial(
    ratio_tables,
    title=TITLE,
    caption="'blocks from 256': put together by matrix products from the inverses of blocks of less than 256 rows.",
    with_time=(TORCH,),
    base=TORCH,
)
pictures = partial(time_pictures, title=titled(TITLE), what="Time of the inverse", base=TORCH)


def remarks(rows: list[Row]) -> list[str]:
    """Return a line for each data type that names the fastest way for each n."""
    said = []
    for group in grouped(rows, setting).values():
        best = {case.n: min(found.values(), key=lambda row: row.p50).provider for case, found in by_case(group).items()}
        words = [
            f"{name} at n = {listed_n([n for n, winner in sorted(best.items()) if winner == name])}"
            for name in by_provider(group)
            if name in best.values()
        ]
        said.append(f"{group[0].case.dtype}: the fastest is {listed(words)}.")
    return said
