"""The main job: train exact GPs on real data, side by side, and compare time, loss, test error, hyperparameters.

Every way starts from the same hyperparameters. The ways take turns of a few steps, so that all trainings end at the
same time; a turn's first step is not timed, as the threads of the way before may still spin. A step is what a user
waits for: zero_grad, forward, backward and Adam's update.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache, partial

import torch

from ..shared import peak
from ..shared.data import DataSet, load
from ..shared.machine import stamp
from ..shared.measuring import Advance, spread, timed
from ..shared.models import ExactGP, dense_at_every_n, make_model, training_step
from ..shared.options import DTYPES, Options
from ..shared.pictures import dot_pictures
from ..shared.rows import Case, Found, Row, grouped, setting
from ..shared.tables import KERNEL_TITLES, WAY, Cell, Table, case_tables, conditions, mebibytes, once, over, time_of
from ..shared.ways import LOG_PROB, STOCK, TENSORS, WAYS, WAYS_CAPTION

TITLE = "Training on real data: time, loss and test error with the flag off and on"
PROVIDERS = (STOCK, LOG_PROB, TENSORS)
LARGEST = 2000  # of large sets the first rows are used, unless --n says how many
LEARNING_RATE = 0.1
TURN = 5  # steps

# Two optimizations that round differently drift apart a little; beyond this they found something else.
SAME = {"float64": 1e-4, "float32": 5e-2}


@lru_cache(maxsize=1)
def _data_sets(options: Options) -> dict[tuple[str, int], DataSet]:
    """Return the data sets cut to the sizes that were asked for, by name and n."""
    sizes = options.sizes or ((500,) if options.quick else (LARGEST,))
    cut = {}
    for data in load(options):
        for n in sorted({min(size, len(data.train_y)) for size in sizes}):
            cut[data.name, n] = replace(data, train_x=data.train_x[:n], train_y=data.train_y[:n])
    return cut


def _steps(options: Options) -> int:
    return options.steps or (20 if options.quick else 200)


def cases(options: Options) -> list[Case]:
    settings = f"{_steps(options)} steps of Adam; split {options.split}, data "
    return [
        Case("uci", name, n, data.train_x.shape[1], dtype, options.device, kernel, settings=settings + data.fingerprint)
        for dtype in options.dtypes or ("float64",)
        for kernel in options.kernels or ("rbf",)
        for (name, n), data in _data_sets(options).items()
    ]


def _hyperparameters(model: ExactGP) -> torch.Tensor:
    """Return noise, outputscale and lengthscales, and last the mean."""
    scale, mean = model.covar_module, model.mean_module.constant
    parts = [model.likelihood.noise, scale.outputscale, scale.base_kernel.lengthscale, mean]
    return torch.cat([part.detach().reshape(-1).double().cpu() for part in parts])


def _difference(found: torch.Tensor, reference: torch.Tensor) -> float:
    """Return the largest relative difference of hyperparameters; the mean's is in units of the target."""
    scale = reference.abs()
    scale[-1] = 1.0
    return float(((found - reference).abs() / scale).max())


def _test_error(model: ExactGP, x: torch.Tensor, y: torch.Tensor) -> dict[str, float]:
    """Return RMSE and mean negative log predictive density, in standardized units."""
    model.eval()
    with torch.no_grad():
        prediction = model.likelihood(model(x))
        mean, variance = prediction.mean, prediction.variance
    squared = (mean - y) ** 2
    density = 0.5 * (torch.log(2 * torch.pi * variance) + squared / variance)
    return {"rmse": float(squared.mean().sqrt()), "nll": float(density.mean())}


def _optimization(model: ExactGP) -> Callable[[], torch.Tensor]:
    """Return a step of Adam, which returns the loss before it."""
    optimizer = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE)
    gradient = training_step(model)

    def step() -> torch.Tensor:
        loss = gradient()
        optimizer.step()
        return loss

    return step


@dense_at_every_n()
def measure(case: Case, options: Options, advance: Advance) -> list[Row]:
    """Train the same model in every way, a step of each in turn."""
    data = _data_sets(options)[case.case, case.n]
    steps = _steps(options)
    train_x, train_y, test_x, test_y = (
        torch.as_tensor(array, dtype=DTYPES[case.dtype], device=case.device)
        for array in (data.train_x, data.train_y, data.test_x, data.test_y)
    )
    models = {way: make_model(train_x, train_y, case.kernel) for way in PROVIDERS}
    optimizations = {way: _optimization(model) for way, model in models.items()}
    seconds: dict[str, list[list[float]]] = {way: [] for way in PROVIDERS}
    for done in range(0, steps, TURN):
        for way, step in optimizations.items():
            with WAYS[way]():
                seconds[way].append([timed(step, case.device) for _ in range(min(TURN, steps - done))])
        advance(done / steps)
    rows, found = [], {way: _hyperparameters(model) for way, model in models.items()}
    for way, model in models.items():
        with WAYS[way]():
            final = training_step(model)
            values = {"loss": float(final())}
            held = peak.peak_bytes(final, case.device)
            values |= _test_error(model, test_x, test_y)
        values |= {
            "test_rows": len(test_y),
            "training_seconds": sum(map(sum, seconds[way])),
            "hyperparameters": [float(f"{value:.10g}") for value in found[way].tolist()],
            "hyperparameter_difference": _difference(found[way], found[STOCK]),
        }
        quantiles = spread([time for turn in seconds[way] for time in turn[1:] or turn])
        rows.append(
            Row(case, way, "step with Adam", **quantiles, peak_memory=held, values=values, **stamp(case.device))
        )
    return rows


def _alike(row: Row) -> tuple:
    """Return the setting of `row` without the data's checksum."""
    *shared, settings = setting(row)
    return (*shared, settings.split(";")[0])


def _title(row: Row) -> str:
    *_, settings = _alike(row)
    return f"{KERNEL_TITLES[row.case.kernel]}, {row.case.dtype}, {settings}; {conditions(row)}"


def _hyperparameters_cell(row: Row, found: Found) -> str:
    difference = row.values["hyperparameter_difference"]
    agreement = "same" if difference <= SAME[row.case.dtype] else "DIFFER"
    return "-" if row.provider == STOCK else f"{agreement} ({difference:.0e})"


HEADS = {
    "data": once(lambda row, found: row.case.case),
    "n": once(lambda row, found: f"{row.case.n:,}"),
    **WAY,
}
TIMES = {
    "step (ms)": lambda row, found: time_of(row.provider)(row, found),
    "ratio": lambda row, found: over(STOCK, row.provider)(row, found),
    "MiB": lambda row, found: mebibytes(row),
}
RESULTS = {
    **{
        head: lambda row, found, name=name: f"{row.values[name]:.3f}"
        for head, name in (("loss", "loss"), ("RMSE", "rmse"), ("NLL", "nll"))
    },
    "hyperparameters": _hyperparameters_cell,
}


def _table(rows: list[Row], what: str, columns: dict[str, Cell], caption: str) -> Table:
    title = f"Training on real data: {what}. "
    (made,) = case_tables(rows, lambda row: title + _title(row), HEADS | columns, caption, _alike, PROVIDERS)
    return made


def tables(rows: list[Row]) -> list[Table]:
    """Return a table of times and one of results for each machine, data type, kernel and number of steps."""
    made = []
    for group in grouped(rows, _alike).values():
        caption = (
            "Step of training (with Adam's): median and [20 %, 80 %] quantiles, the ways in turn; ratio: stock / way; "
            f"MiB: peak memory of the step. {WAYS_CAPTION}"
        )
        made.append(_table(group, "time", TIMES, caption))
        caption = (
            "Loss: negative log marginal likelihood a point, at the end; RMSE, NLL: of the test rows, in standardized "
            f"units; hyperparameters: the same as stock's to {SAME[group[0].case.dtype]:.0e} or not, and the largest "
            "relative difference."
        )
        made.append(replace(_table(group, "result", RESULTS, caption), source=""))  # which stands at the one above
    return made


pictures = partial(
    dot_pictures,
    title=lambda row: f"Training on real data: {_title(row)}",
    what="Time of a training step",
    label=lambda row: f"{row.case.case} (n = {row.case.n:,}, d = {row.case.d})",
    key=_alike,
)


def remarks(rows: list[Row]) -> list[str]:
    """Return a line for every data set on which a way found other hyperparameters than stock."""
    return [
        f"{row.case.case}, n = {row.case.n:,}: {row.provider} found other hyperparameters than stock "
        f"(largest relative difference {row.values['hyperparameter_difference']:.1e})."
        for row in rows
        if row.values["hyperparameter_difference"] > SAME[row.case.dtype]
    ]
