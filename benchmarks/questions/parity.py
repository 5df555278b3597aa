"""Does a device compute what the CPU computes: loss, gradient, posterior, fantasies, batched and not?

The reference is GPyTorch on the CPU with the flag off. On CUDA, batched solves were once silently wrong.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch

from ..shared.machine import stamp
from ..shared.measuring import Advance, cases_of, distance, with_room
from ..shared.models import loss_and_gradient, model_of, sample_problem, test_points_of, training_step
from ..shared.options import DTYPES, Options
from ..shared.rows import Case, Row
from ..shared.tables import WAY, N, case_tables, describe
from ..shared.ways import STOCK, TENSORS, WAYS

TITLE = "Distance from the CPU with the flag off"
BATCHES = (1, 3)
TEST_POINTS, FANTASIES = 20, 4
WHAT = ("loss and gradient", "mean", "covariance", "fantasy's mean", "fantasy's covariance")
SAME = {"float64": 1e-8, "float32": 2e-2}  # relative


def cases(options: Options) -> list[Case]:
    kernels = ("rbf", "matern")
    made = cases_of("parity", options, (50, 1500), quick=(50,), kernels=kernels, m=TEST_POINTS, settings="")
    return [replace(case, batch=batch) for case in made for batch in BATCHES]


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


@with_room()
def measure(case: Case, options: Options, advance: Advance) -> list[Row]:
    """Compute everything on the device in both ways and compare it with stock's on the CPU."""
    with WAYS[STOCK]():
        reference = _results(replace(case, device="cpu"))
    rows = []
    for way in (STOCK, TENSORS):
        with WAYS[way]():
            found = _results(case)
        values = {what: distance(found[what], reference[what]) for what in WHAT}
        rows.append(Row(case, way, "parity", values=values, **stamp(case.device)))
        advance(len(rows) / 2)
    return rows


def differs(row: Row) -> bool:
    """Return whether one of the numbers is further from the reference than rounding explains."""
    return any(not value <= SAME[row.case.dtype] for value in row.values.values())


tables = partial(
    case_tables,
    title=lambda row: f"{TITLE}: {describe(row)}, {row.case.device}",
    columns=N
    | {"models": lambda row, found: f"{row.case.batch}"}
    | WAY
    | {what: lambda row, found, what=what: f"{row.values[what]:.0e}" for what in WHAT}
    | {"verdict": lambda row, found: "DIFFERS" if differs(row) else "same"},
    caption=f"Relative, by norms; the same: at most {SAME['float64']:g} in float64 and {SAME['float32']:g} in float32. "
    f"A fantasy: the model after {FANTASIES} more points.",
    ways=(STOCK, TENSORS),
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
