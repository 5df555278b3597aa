"""What does a training step gain with every kernel, and what could be had at all?

Beside the flag off and on stands a step written by hand: the kernel's own forward and backward by autograd, the
factorization and the inverse, and no module or operator but the kernel's between them. A closed form may do better; a
kernel without one cannot. What has structure stays upstream's, and is to take as long as with the flag off.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from linear_operator.utils.cholesky import psd_safe_cholesky
from torch.nn.functional import softplus

from ..shared.agreement import check_same, noted
from ..shared.compare import both_times, case_tables, dot_pictures
from ..shared.measuring import fits, rows_in_turn
from ..shared.models import dense_at_every_n, training_step
from ..shared.options import DTYPES, InputError, Options
from ..shared.row import Case, Row
from ..shared.show import Table, conditions, ratio, times
from ..shared.timing import Variant
from ..shared.ways import STOCK, TENSORS, run_in, takes_tensors
from .all_kernels import LEFT, D, KernelGP, available, inputs_of
from .train import STOCK_MATRICES

TITLE = "A training step with every kernel"
BY_HAND = "by hand"
_WITH_GRADIENT = "and gradient"


def cases(options: Options) -> list[Case]:
    """Return one case for each kernel, data type and n."""
    names = available() if options.sets is None else options.sets
    unknown = [name for name in names if name not in available()]
    if unknown:
        raise InputError(f"There is no kernel called {unknown[0]!r}; there are {', '.join(available())}.")
    return [
        Case("kernels", name, n, D, dtype, options.device, kernel="", settings=options.effort)
        for name in names
        for dtype in options.choose("dtypes", ("float64",))
        for n in options.choose("sizes", (30, 100, 500, 1000), quick=(30, 100))
        if n <= 100 or not name.endswith(_WITH_GRADIENT)  # of which there are seven rows a point
    ]


def by_hand(model: KernelGP) -> Callable[[], torch.Tensor]:
    """Return the step with nothing but the kernel's own operations and LAPACK's, for a model of one output.

    With K = L L^T and alpha = K^-1 (y - c), the gradient of the loss in K is (K^-1 - alpha alpha^T) / 2n.
    """
    (x,), y = model.train_inputs, model.train_targets
    raw_noise, constant = model.likelihood.noise_covar.raw_noise, model.mean_module.raw_constant
    bound, n = model.likelihood.noise_covar.raw_noise_constraint.lower_bound, len(y)

    def step() -> torch.Tensor:
        for parameter in parameters:
            parameter.grad = None
        covar = model.covar_module(x).to_dense()
        noisy = covar.detach().clone()
        noisy.diagonal().add_(softplus(raw_noise.detach()) + bound)
        factor = psd_safe_cholesky(noisy)
        residual = (y - constant.detach()).unsqueeze(-1)
        alpha = torch.cholesky_solve(residual, factor)
        grad = torch.cholesky_inverse(factor).addmm_(alpha, alpha.mT, alpha=-1).div_(2 * n)
        covar.backward(grad)
        raw_noise.grad = (grad.trace() * torch.sigmoid(raw_noise)).detach()
        constant.grad = -alpha.sum().view_as(constant) / n
        deviance = (residual.mT @ alpha).squeeze() + 2 * factor.diagonal().log().sum() + n * math.log(2 * math.pi)
        return deviance / (2 * n)

    parameters = list(model.parameters())
    return step


def _loss_and_gradient(model: KernelGP, step: Callable[[], torch.Tensor]) -> torch.Tensor:
    loss = step()
    gradients = [parameter.grad.reshape(-1) for parameter in model.parameters() if parameter.grad is not None]
    return torch.cat([loss.reshape(1), *gradients]).detach().double().cpu()


def measure(case: Case, options: Options, advance: Callable[[float], None]) -> list[Row]:
    """Time a step in every way, in turn."""
    rows_a_point = D + 1 if case.case.endswith(_WITH_GRADIENT) else 1
    if not fits(case, STOCK_MATRICES * rows_a_point**2):
        return []
    x = inputs_of(case.case, case.n, DTYPES[case.dtype], case.device)
    variants, results = {}, {}
    with dense_at_every_n(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for way in (STOCK, TENSORS):
            model = KernelGP(case.case, x)
            variants[way] = Variant(run_in(way, training_step(model)))
            results[way] = _loss_and_gradient(model, variants[way].run)
        is_left = case.case in LEFT
        if takes_tensors(variants[TENSORS].run) == is_left:
            raise RuntimeError(f"The training step of {case} {'took' if is_left else 'did not take'} the tensor path.")
        if not is_left and not model.is_multitask:
            model = KernelGP(case.case, x)
            variants[BY_HAND] = Variant(run_in(STOCK, by_hand(model)))
            results[BY_HAND] = _loss_and_gradient(model, variants[BY_HAND].run)
        distances = check_same(results, case.dtype, f"loss and gradient, {case.case}, n = {case.n}")
        return rows_in_turn(case, "step", variants, options, advance, noted(distances))


def _title(row: Row) -> str:
    return f"{TITLE}: n = {row.case.n:,}, d = {D}, {row.case.dtype}, {conditions(row)}"


def _of_table(row: Row) -> tuple:
    machine = tuple(sorted(row.machine.items()))
    return row.case.n, row.case.device, machine, row.case.dtype, row.case.settings


def _lines(case: Case, found: dict[str, Row]) -> list[list[str]]:
    ratios = [times(ratio(found[STOCK], found.get(way))) for way in (TENSORS, BY_HAND)]
    name = f"{case.case} (left to upstream)" if case.case in LEFT else case.case
    return [[name, *both_times(found), *ratios]]


def tables(rows: list[Row]) -> list[Table]:
    """Return one table for each n and data type."""
    rows = sorted(rows, key=lambda row: row.case.n)
    columns = ["kernel", "stock (ms)", "tensors (ms)", "stock / tensors", f"stock / {BY_HAND}"]
    caption = (
        f"Medians and [20 %, 80 %] quantiles, in turn. {BY_HAND.capitalize()}: the kernel's own forward and backward, "
        "and the factorization and inverse, with nothing around them."
    )
    return case_tables(rows, _title, columns, _lines, caption, key=_of_table)


def pictures(rows: list[Row], folder: Path) -> list[Path]:
    """Plot times and ratios, one picture for each n and data type."""
    return dot_pictures(
        rows, folder, _title, "Time", lambda row: row.case.case, key=_of_table, part=lambda row: (f"n{row.case.n}",)
    )
