"""How long does a prediction take, and how much memory: at the first call, and of a model that was asked before?"""

from __future__ import annotations

from functools import partial

import torch

from ..shared.machine import available_bytes
from ..shared.measuring import Advance, Variant, check_same, does_fit, rows_in_turn
from ..shared.models import D, ExactGP, dense_at_every_n, mean_and_variance, model_of, test_points_of
from ..shared.options import DTYPES, Options
from ..shared.pictures import dot_pictures
from ..shared.rows import Case, Row, setting_and_mode
from ..shared.tables import MEMORY, TIMES_AND_RATIO, N, case_tables, say, titled
from ..shared.ways import STOCK, TENSORS, run_in

TITLE = "Time of a prediction"
PROBLEMS = ((20, 1), (100, 100), (1000, 100), (2000, 1), (2000, 1000), (500, 65536))
QUICK_PROBLEMS = ((20, 1), (100, 100), (1000, 100), (500, 65536))
TEST_POINTS = 100  # for the sizes of --n

FIRST, SECOND, MEAN, GRADIENT = "first call", "later call", "later call, mean only", "later call, with gradient"


def cases(options: Options) -> list[Case]:
    problems = QUICK_PROBLEMS if options.quick else PROBLEMS
    if options.sizes:
        problems = tuple((n, TEST_POINTS) for n in options.sizes)
    return [
        Case("predict", "synthetic", n, D, dtype, options.device, kernel, m=m, settings=options.effort)
        for kernel, dtype, (n, m) in options.grid(problems)
    ]


@torch.no_grad()
def _mean(model: ExactGP, test_x: torch.Tensor) -> torch.Tensor:
    return model(test_x).mean


def _gradient(model: ExactGP, test_x: torch.Tensor) -> torch.Tensor:
    """Return the gradient with respect to the test points, as an acquisition function needs it."""
    test_x = test_x.detach().requires_grad_(True)
    posterior = model(test_x)
    (gradient,) = torch.autograd.grad(posterior.mean.sum() + posterior.variance.sum(), test_x)
    return gradient


CALLS = {
    FIRST: mean_and_variance,
    SECOND: mean_and_variance,
    MEAN: _mean,
    GRADIENT: _gradient,
}


def ways_that_fit(case: Case) -> list[str]:
    """Return stock only where there is room for the joint covariance of all points, which it builds."""
    needed = (case.n + case.m) ** 2 * DTYPES[case.dtype].itemsize
    if needed < available_bytes(case.device) / 2:
        return [STOCK, TENSORS]
    asked = f"{needed / 2**30:.0f} GiB"
    say(f"{case.question}, n = {case.n:,}, {case.m:,} test points: {STOCK} is left out, as it asks for {asked}.")
    return [TENSORS]


@dense_at_every_n()
def measure(case: Case, options: Options, advance: Advance) -> list[Row]:
    """Time the kinds of call, each in both ways in turn."""
    test_x = test_points_of(case)
    models = {way: model_of(case).eval() for way in ways_that_fit(case)}
    rows = []
    for done, (mode, call) in enumerate(CALLS.items()):
        if mode == GRADIENT and case.m > 2000:
            continue  # nobody optimizes so many points at once
        variants, results = {}, {}
        for way, model in models.items():
            run = run_in(way, partial(call, model, test_x))
            if not does_fit(run):
                say(f"predict, n = {case.n:,}, {case.m:,} test points, {mode}: {way} ran out of memory.")
                continue
            results[way] = run().double().cpu()
            # A round of training drops what a prediction has cached.
            forget = {"prepare": lambda model=model: model.train().eval()} if mode == FIRST else {}
            variants[way] = Variant(run, **forget)
        if results:
            check_same(results, case.dtype, f"prediction, {mode}, n = {case.n}")
            rows += rows_in_turn(
                case, mode, variants, options, lambda part, done=done: advance((done + part) / len(CALLS))
            )
    return rows


tables = partial(
    case_tables,
    title=titled(TITLE, with_mode=True),
    columns=N | {"test points": lambda row, found: f"{row.case.m:,}"} | TIMES_AND_RATIO | MEMORY,
    caption="Mean and variance, unless said otherwise; `fast_pred_var` at its default. MiB: peak memory of a call. "
    "Stock is left out (-) where there is no room for the joint covariance of all points, which it builds.",
    key=setting_and_mode,
)
pictures = partial(
    dot_pictures,
    title=titled(TITLE, with_mode=True),
    what=TITLE,
    label=lambda row: f"n = {row.case.n:,}, {row.case.m:,} test point{'s' if row.case.m > 1 else ''}",
    key=setting_and_mode,
    part=lambda row: (row.mode,),
)
