"""Which way from a Cholesky factor to the inverse is the fastest?

`torch.cholesky_inverse` against two triangular solves, against the inverse of the factor times itself, and against the
blocked inverse of this package, from several block sizes on.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from unittest import mock

import torch

from ..shared.against_n import ratio_tables, time_pictures
from ..shared.agreement import check_same, noted
from ..shared.measuring import fits, rows_in_turn
from ..shared.models import dense_at_every_n
from ..shared.options import DTYPES, Options
from ..shared.row import Case, Row
from ..shared.rows import by_case, grouped, providers, setting
from ..shared.show import Table, listed
from ..shared.timing import Variant
from .train import STOCK_MATRICES, D, covariance_of

blocked = import_module("gpytorch.functions.cholesky_inverse")

TITLE = "Inverse from a Cholesky factor"
TORCH, SOLVES, PRODUCT = "cholesky_inverse", "two triangular solves", "inverse of the factor, squared"
BLOCKS = (128, 256, 512, 1024, 2048)


def cases(options: Options) -> list[Case]:
    """Return one case for each data type and n."""
    sizes = options.choose("sizes", (50, 200, 500, 1000, 2000, 4000), quick=(50, 200, 500))
    return [
        Case("inverse", "synthetic", n, D, dtype, options.device, kernel, settings=options.effort)
        for kernel, dtype, n in options.grid(sizes, tuple(DTYPES))
    ]


def _solves(factor: torch.Tensor, identity: torch.Tensor) -> torch.Tensor:
    half = torch.linalg.solve_triangular(factor, identity, upper=False)
    return torch.linalg.solve_triangular(factor.mT, half, upper=True)


def _product(factor: torch.Tensor, identity: torch.Tensor) -> torch.Tensor:
    half = torch.linalg.solve_triangular(factor, identity, upper=False)
    return half.mT @ half


def _blocked(factor: torch.Tensor, work: torch.Tensor, size: int) -> torch.Tensor:
    with mock.patch.object(blocked, "_BLOCKED_FROM", size):
        return blocked.cholesky_inverse_(work)


def measure(case: Case, options: Options, advance: Callable[[float], None]) -> list[Row]:
    """Time all ways in turn, after a check that they find the same inverse."""
    if not fits(case, STOCK_MATRICES):
        return []
    with dense_at_every_n():
        factor = torch.linalg.cholesky(covariance_of(case))
    identity = torch.eye(case.n, dtype=factor.dtype, device=factor.device)
    work = torch.empty_like(factor.mT).mT  # in LAPACK's order, as a training step has it
    variants = {
        TORCH: Variant(lambda: torch.cholesky_inverse(factor)),
        SOLVES: Variant(lambda: _solves(factor, identity)),
        PRODUCT: Variant(lambda: _product(factor, identity)),
    }
    for size in BLOCKS:
        if size <= case.n:
            variants[f"blocks from {size}"] = Variant(
                lambda size=size: _blocked(factor, work, size), prepare=lambda: work.copy_(factor)
            )
    # Compared by what they do to a few vectors: on a GPU the inverses themselves would fill the CPU's memory.
    probes = torch.linspace(-1, 1, 4 * case.n, dtype=factor.dtype, device=factor.device).sin().view(case.n, 4)
    results = {}
    for name, variant in variants.items():
        variant.prepare()
        results[name] = (variant.run() @ probes).double().cpu().reshape(-1)
    distances = check_same(results, case.dtype, f"inverse, n = {case.n}")
    return rows_in_turn(case, "inverse", variants, options, advance, noted(distances), with_memory=False)


def tables(rows: list[Row]) -> list[Table]:
    """Return one table for each data type."""
    caption = "'blocks from 256': put together by matrix products from the inverses of blocks of less than 256 rows."
    return ratio_tables(rows, TITLE, caption, (TORCH,), base=TORCH)


def remarks(rows: list[Row]) -> list[str]:
    """Return a line for each data type that names the fastest way for each n."""
    said = []
    for group in grouped(rows, setting).values():
        best = {case.n: min(found.values(), key=lambda row: row.p50).provider for case, found in by_case(group).items()}
        words = [
            f"{name} at n = {listed([f'{n:,}' for n, winner in sorted(best.items()) if winner == name])}"
            for name in providers(group)
            if name in best.values()
        ]
        said.append(f"{group[0].case.dtype}: the fastest is {listed(words)}.")
    return said


def pictures(rows: list[Row], folder: Path) -> list[Path]:
    """Plot times and ratios against n, one picture for each data type."""
    return time_pictures(rows, folder, TITLE, "Time of the inverse", base=TORCH)
