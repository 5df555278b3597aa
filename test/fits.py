"""Fits of BoTorch's models with the flag off and on: ``python test/fits.py [name ...] [--n 30] [--sets 20]``.

Where an optimizer branches on rounding, the loss at the end of one fit tells nothing. Over many sets of data neither
way may be better on average: a line has the mean of the differences with its standard error, and the times. Beside it
stands what upstream's own loss changes by if the targets are multiplied by 1 + 1e-15.
"""

from __future__ import annotations

import argparse
import statistics
import warnings
from collections.abc import Callable
from time import perf_counter

import torch
from botorch.fit import fit_gpytorch_mll
from botorch.models import (
    KroneckerMultiTaskGP,
    MixedSingleTaskGP,
    ModelListGP,
    MultiTaskGP,
    SingleTaskGP,
    SingleTaskMultiFidelityGP,
)
from botorch.models.map_saas import AdditiveMapSaasSingleTaskGP
from botorch.optim.closures.model_closures import get_loss_closure
from botorch.test_functions import Hartmann
from torch import Tensor

from gpytorch.mlls import ExactMarginalLogLikelihood, SumMarginalLogLikelihood
from gpytorch.models import GP
from gpytorch.settings import use_torch_tensors


def several(num_outputs: int, has_noise: bool = False) -> Callable[[Tensor, Tensor], GP]:
    def make(x: Tensor, y: Tensor) -> GP:
        y = y[:, :num_outputs]
        return SingleTaskGP(x, y, train_Yvar=torch.full_like(y, 0.01) if has_noise else None)

    return make


def listed(x: Tensor, y: Tensor) -> GP:
    return ModelListGP(*(SingleTaskGP(x, y[:, i : i + 1]) for i in range(2)))


def mixed(x: Tensor, y: Tensor) -> GP:
    return MixedSingleTaskGP(torch.cat([x[:, :-1], (3 * x[:, -1:]).floor()], dim=-1), y[:, :1], cat_dims=[-1])


def of_tasks(x: Tensor, y: Tensor) -> GP:
    tasks = torch.arange(len(x)).unsqueeze(-1) % 2
    return MultiTaskGP(torch.cat([x, tasks.to(x)], dim=-1), y.gather(-1, tasks), task_feature=-1)


MODELS: dict[str, Callable[[Tensor, Tensor], GP]] = {
    "SingleTaskGP": several(1),
    "SingleTaskGP of 2 outputs": several(2),
    "SingleTaskGP of 4 outputs": several(4),
    "SingleTaskGP with train_Yvar": several(1, has_noise=True),
    "SingleTaskGP of 2 outputs with train_Yvar": several(2, has_noise=True),
    "ModelListGP": listed,
    "MixedSingleTaskGP": mixed,
    "MultiTaskGP": of_tasks,
    "SingleTaskMultiFidelityGP": lambda x, y: SingleTaskMultiFidelityGP(x, y[:, :1], data_fidelities=[5]),
    "AdditiveMapSaasSingleTaskGP": lambda x, y: AdditiveMapSaasSingleTaskGP(x, y[:, :1]),
    "KroneckerMultiTaskGP": lambda x, y: KroneckerMultiTaskGP(x, y[:, :2]),
}


def data(n: int, seed: int) -> tuple[Tensor, Tensor]:
    """Hartmann's function of six variables, with noise, at points shifted by more for each of four outputs."""
    hartmann = Hartmann(negate=True).double()
    x = torch.quasirandom.SobolEngine(6, scramble=True, seed=seed).draw(n, dtype=torch.float64)
    y = torch.stack([hartmann((x + 0.13 * shift) % 1) for shift in range(4)], dim=-1)
    return x, y + 0.05 * torch.randn(y.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def fit(name: str, n: int, seed: int, flag: bool, nudge: float = 0.0) -> tuple[float, float]:
    """Return the loss at the end of a fit, as upstream computes it, and the seconds that the fit took."""
    x, y = data(n, seed)
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # BoTorch's advice on scaling, and of its optimizers
        model = MODELS[name](x, y * (1 + nudge))
        likelihood = SumMarginalLogLikelihood if isinstance(model, ModelListGP) else ExactMarginalLogLikelihood
        mll = likelihood(model.likelihood, model)
        with use_torch_tensors(flag):
            start = perf_counter()
            fit_gpytorch_mll(mll)
            seconds = perf_counter() - start
        mll.train()
        with use_torch_tensors(False), torch.no_grad():
            return get_loss_closure(mll)().sum().item(), seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split(":")[0])
    parser.add_argument("names", nargs="*", default=list(MODELS), metavar="name", help=", ".join(MODELS))
    parser.add_argument("--n", type=int, default=30)
    parser.add_argument("--sets", type=int, default=20)
    arguments = parser.parse_args()
    for name in arguments.names:
        fit(name, arguments.n, 0, True)
        of_flag, of_nudge, gains = [], [], []
        for seed in range(arguments.sets):
            flags = (False, True) if seed % 2 else (True, False)
            ends = {flag: fit(name, arguments.n, seed, flag) for flag in flags}
            (off, off_seconds), (on, on_seconds) = ends[False], ends[True]
            of_flag.append(on - off)
            of_nudge.append(fit(name, arguments.n, seed, False, nudge=1e-15)[0] - off)
            gains.append(off_seconds / on_seconds)
        print(
            f"{name}, n = {arguments.n}: {statistics.median(gains):.2f} times as fast, from {min(gains):.2f} to "
            f"{max(gains):.2f}; loss with the flag on less that with it off {summary(of_flag)}; with targets nudged "
            f"less that without {summary(of_nudge)}",
            flush=True,
        )


def summary(differences: list[float]) -> str:
    error = statistics.stdev(differences) / len(differences) ** 0.5 if len(differences) > 1 else float("nan")
    mean, least, most = statistics.mean(differences), min(differences), max(differences)
    return f"{mean:+.1e} (standard error {error:.1e}), from {least:+.1e} to {most:+.1e}"


if __name__ == "__main__":
    main()
