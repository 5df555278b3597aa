"""What does OPENBLAS_NUM_THREADS=1 gain in BoTorch, where SciPy brings a thread pool beside torch's? For the report.

SciPy's optimizers call their OpenBLAS, whose threads go on spinning for a while after each call. Meanwhile torch's wait
for the cores that they hold.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import scipy.linalg  # noqa: F401 (loads the OpenBLAS of SciPy, beside NumPy's)
import torch
from threadpoolctl import ThreadpoolController

from .measuring import Variant, in_turn
from .tables import milliseconds
from .ways import STOCK, TENSORS, run_in

SIZE, NUM_OUTPUTS = 50, 2
VARIABLE = "OPENBLAS_NUM_THREADS=1"


def remarks(seconds: float) -> list[str]:
    """Return what the variable gains a fit of several outputs, a line; none where there are no two pools.

    :param seconds: How long the fits are run in turn.
    """
    openblas = ThreadpoolController().select(internal_api="openblas")
    threads = max((each["num_threads"] for each in openblas.info()), default=1)
    if threads == 1 or torch.get_num_threads() == 1:
        return []

    def fit_within(limit: Callable[[], AbstractContextManager], way: str) -> None:
        with limit():
            run_in(way, _fit)()

    # The latter is what the variable does, in a process that runs already.
    limits = {"": nullcontext, VARIABLE: partial(openblas.limit, limits=1)}
    variants = {
        (name, way): Variant(partial(fit_within, limit, way))
        for name, limit in limits.items()
        for way in (STOCK, TENSORS)
    }
    times = in_turn(variants, "cpu", seconds, least=3)
    medians = {which: sorted(found)[len(found) // 2] for which, found in times.items()}
    return [sentence(medians, torch.get_num_threads(), threads)]


def sentence(medians: dict[tuple[str, str], float], torchs: int, openblas: int) -> str:
    """Return what was measured in words.

    :param medians: Seconds of a fit, without the variable ("") and with it, for each way.
    :param torchs: The number of torch's threads; `openblas` that of OpenBLAS's.
    """
    gains = {way: medians["", way] / medians[VARIABLE, way] for way in (STOCK, TENSORS)}
    of_all = medians["", STOCK] / medians[VARIABLE, TENSORS]
    advice = f"set `{VARIABLE}`" if max(gains.values()) > 1.05 else f"`{VARIABLE}` gains nothing here"
    off, on, off_with, on_with = (
        milliseconds(medians[name, way]) for name in ("", VARIABLE) for way in (STOCK, TENSORS)
    )
    return (
        f"- This process holds two thread pools, torch's of {torchs} threads and OpenBLAS's of {openblas}, and SciPy's "
        f"optimizers keep both at work: {advice}. `fit_gpytorch_mll` of {NUM_OUTPUTS} outputs at n = {SIZE} takes "
        f"{off} ms with the flag off and {on} ms with it on; with `{VARIABLE}` {off_with} and {on_with} ms. The "
        f"variable makes it {gains[STOCK]:.1f} times as fast with the flag off and {gains[TENSORS]:.1f} times with it "
        f"on; both together {of_all:.1f} times."
    )


def _fit() -> None:
    from botorch.fit import fit_gpytorch_mll
    from botorch.models import SingleTaskGP

    from gpytorch.mlls import ExactMarginalLogLikelihood

    x = torch.quasirandom.SobolEngine(6, scramble=True, seed=0).draw(SIZE, dtype=torch.float64)
    y = torch.stack([torch.sin(3 * x.sum(-1) + shift) for shift in range(NUM_OUTPUTS)], dim=-1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # BoTorch's advice on scaling
        model = SingleTaskGP(x, y)
        fit_gpytorch_mll(ExactMarginalLogLikelihood(model.likelihood, model))
