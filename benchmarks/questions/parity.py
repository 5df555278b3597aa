"""Does a device compute what the CPU computes: loss, gradient, posterior, fantasies, batched and not?

The reference is GPyTorch on the CPU with the flag off. On CUDA, batched solves were once silently wrong.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from ..shared.against_n import describe
from ..shared.agreement import distance
from ..shared.compare import case_tables
from ..shared.machine import stamp
from ..shared.measuring import fits
from ..shared.models import dense_at_every_n, loss_and_gradient, model_of, sample_problem, test_points_of, training_step
from ..shared.options import DTYPES, Options
from ..shared.row import Case, Row
from ..shared.show import Table
from ..shared.ways import STOCK, TENSORS, WAYS
from .train import STOCK_MATRICES, D

TITLE = "Distance from the CPU with the flag off"
MODE = "parity"
BATCHES = (1, 3)
TEST_POINTS, FANTASIES = 20, 4
WHAT = ("loss and gradient", "mean", "covariance", "fantasy's mean", "fantasy's covariance")
SAME = {"float64": 1e-8, "float32": 2e-2}  # relative


def cases(options: Options) -> list[Case]:
    """Return one case for each kernel, data type, n and number of models; the larger n is worked through in blocks."""
    sizes = options.choose("sizes", (50, 1500), quick=(50,))
    return [
        Case("parity", "synthetic", n, D, dtype, options.device, kernel, batch, TEST_POINTS)
        for kernel, dtype, n in options.grid(sizes, kernels=("rbf", "matern"))
        for batch in BATCHES
    ]


def _results(case: Case) -> dict[str, torch.Tensor]:
    """Return the numbers to be compared, on the CPU."""
    model = model_of(case)
    found = [loss_and_gradient(model, training_step(model))]
    test_x = test_points_of(case)
    new = sample_problem(FANTASIES, case.d, DTYPES[case.dtype], case.device, case.batch, seed=2)
    model.eval()
    with torch.no_grad():
        posterior = model(test_x)
        found += [posterior.mean, posterior.covariance_matrix]
        posterior = model.get_fantasy_model(*new)(test_x)
        found += [posterior.mean, posterior.covariance_matrix]
    return {what: tensor.double().cpu() for what, tensor in zip(WHAT, found, strict=True)}


def measure(case: Case, options: Options, advance: Callable[[float], None]) -> list[Row]:
    """Compute everything on the device in both ways and compare it with stock's on the CPU."""
    if not fits(case, STOCK_MATRICES):
        return []
    with dense_at_every_n():
        with WAYS[STOCK]():
            reference = _results(replace(case, device="cpu"))
        rows = []
        for way in (STOCK, TENSORS):
            with WAYS[way]():
                found = _results(case)
            values = {what: distance(found[what], reference[what]) for what in WHAT}
            rows.append(Row(case, way, MODE, values=values, **stamp(case.device)))
            advance(len(rows) / 2)
    return rows


def differs(row: Row) -> bool:
    """Return whether one of the numbers is further from the reference than rounding explains."""
    return any(not value <= SAME[row.case.dtype] for value in row.values.values())


def _lines(case: Case, found: dict[str, Row]) -> list[list[str]]:
    head = [f"{case.n:,}", f"{case.batch}"]
    return [
        [*head, way, *(f"{row.values[what]:.0e}" for what in WHAT), "DIFFERS" if differs(row) else "same"]
        for way, row in found.items()
    ]


def tables(rows: list[Row]) -> list[Table]:
    """Return one table for each kernel and data type."""
    return case_tables(
        rows,
        lambda row: f"{TITLE}: {describe(row)}, {row.case.device}",
        ["n", "models", "way", *WHAT, "verdict"],
        _lines,
        f"Relative, by norms; the same: at most {SAME['float64']:g} in float64 and {SAME['float32']:g} in float32. A "
        f"fantasy: the model after {FANTASIES} more points.",
    )


def remarks(rows: list[Row]) -> list[str]:
    """Return a line for everything that differs, or one that says that nothing does."""
    wrong = [
        f"{describe(row)}, n = {row.case.n:,}, {row.case.batch} model{'s' if row.case.batch > 1 else ''}: "
        f"{row.provider} on {row.case.device} DIFFERS from the CPU."
        for row in rows
        if differs(row)
    ]
    return wrong or [f"All {len(rows)} comparisons with the CPU agree."]


def pictures(rows: list[Row], folder: Path) -> list[Path]:
    """Return no pictures: there is nothing to see in rounding errors."""
    return []
