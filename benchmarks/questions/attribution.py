"""Where does the gain come from: the copy after Cholesky, Python and operators, the closed-form backward, the kernel?

Between stock (A) and tensors (D) stand variants that change one thing at a time:

    A  stock
    B  stock without `.contiguous()` after Cholesky
    E  the same arithmetic in plain torch: no modules, no operators; autograd through Cholesky and through the kernel
    F  E with the closed-form backward of the inverse quadratic form and the log determinant
    G  F with the closed-form gradient of the kernel
    D  tensors

The gain A - D is the sum of the copy (A - B), the closed-form backward (E - F), the kernel (F - G), and what operators
and modules cost stock more than tensors, (B - E) - (D - G). Each is measured; the last is a difference of differences
and carries the noise of four times.
"""

from __future__ import annotations

import cProfile
import io
import pstats
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from matplotlib.ticker import PercentFormatter
from torch.nn.functional import softplus
from torch.profiler import ProfilerActivity, profile

import gpytorch

from ..shared import bare
from ..shared.measuring import Advance, Variant, cases_of, check_same, noted, rows_in_turn, with_room
from ..shared.models import ExactGP, loss_and_gradient, model_of, training_step
from ..shared.options import Options
from ..shared.pictures import Curve, Panel, curve_pictures
from ..shared.rows import Case, Found, Row, by_case, grouped, setting
from ..shared.tables import (
    Cell,
    N,
    case_tables,
    describe,
    listed,
    listed_n,
    milliseconds,
    percent,
    ratio,
    span,
    times,
    titled,
)
from ..shared.ways import LOG_PROB, NO_COPY, STOCK, TENSORS, run_in
from .train import steps_that_agree

TITLE = "Where the gain comes from"
BARE, BARE_CLOSED, BARE_KERNEL = "plain torch", "plain torch, closed-form backward", "plain torch, closed-form kernel"
COPY, OPERATORS, BACKWARD, KERNEL = "copy after Cholesky", "Python and operators", "closed-form backward", "kernel"
PARTS = (COPY, OPERATORS, BACKWARD, KERNEL)
NOISE_FLOOR = 1e-4  # GaussianLikelihood's lower bound of the noise


def cases(options: Options) -> list[Case]:
    sizes, quick = (20, 100, 200, 500, 1000, 2000), (20, 100, 500, 1000)
    return cases_of("attribution", options, sizes, quick, kernels=("rbf",) if options.quick else ("rbf", "matern"))


class _Bare(torch.nn.Module):
    """The model's raw parameters, in its order, without its modules."""

    def __init__(self, model: ExactGP, kernel: str) -> None:
        super().__init__()
        for name, parameter in model.named_parameters():
            short = name.rsplit(".", 1)[-1].removeprefix("raw_")
            self.register_parameter(short, torch.nn.Parameter(parameter.detach().clone()))
        (self.x,), self.y = model.train_inputs, model.train_targets
        self.kernel = kernel

    def _problem(self) -> bare.Problem:
        natural = [self.constant, softplus(self.outputscale), softplus(self.lengthscale)]
        return bare.Problem(self.x, self.y, self.kernel, *natural, softplus(self.noise) + NOISE_FLOOR)

    def step(self, inv_quad_logdet: bare.InvQuadLogdet) -> torch.Tensor:
        """Return the loss after a step whose gradient autograd finds, but for what `inv_quad_logdet` brings along."""
        self.zero_grad()
        loss = bare.loss(self._problem(), inv_quad_logdet)
        loss.backward()
        return loss.detach()

    def closed_form_step(self) -> torch.Tensor:
        """Return the loss after a step whose gradient is by formula; the last link, softplus, by its derivative."""
        loss, gradient = bare.loss_and_closed_form_gradient(self._problem())
        self.constant.grad = gradient["mean"].reshape(self.constant.shape)
        for name in ("outputscale", "lengthscale", "noise"):
            raw = getattr(self, name)
            raw.grad = (gradient[name] * torch.sigmoid(raw.detach())).reshape(raw.shape)
        return loss


@with_room()
def measure(case: Case, options: Options, advance: Advance) -> list[Row]:
    """Time all variants in turn; write the profiles of stock and tensors into the output folder."""
    variants, values = steps_that_agree(case, (STOCK, NO_COPY, LOG_PROB, TENSORS))
    model = model_of(case)
    results = {STOCK: loss_and_gradient(model, run_in(STOCK, training_step(model)))}
    bares = {name: _Bare(model, case.kernel) for name in (BARE, BARE_CLOSED, BARE_KERNEL)}
    steps = {
        BARE: partial(bares[BARE].step, bare.by_autograd),
        BARE_CLOSED: partial(bares[BARE_CLOSED].step, gpytorch.functions.TensorInvQuadLogdet.apply),
        BARE_KERNEL: bares[BARE_KERNEL].closed_form_step,
    }
    results |= {name: loss_and_gradient(bares[name], step) for name, step in steps.items()}
    values |= noted(check_same(results, case.dtype, f"loss and gradient in plain torch, n = {case.n}"))
    for way in (STOCK, TENSORS):
        _write_profile(case, way, variants[way].run, options.output)
    variants |= {name: Variant(step) for name, step in steps.items()}
    return rows_in_turn(case, "step", variants, options, advance, values)


def _write_profile(case: Case, way: str, step: Callable[[], object], folder: Path, repetitions: int = 5) -> None:
    """Write where the time of a few steps goes: torch's operators, and Python's functions."""
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if case.device != "cpu" else [])
    with profile(activities=activities) as operators:
        for _ in range(repetitions):
            step()
    functions = cProfile.Profile()
    functions.enable()
    for _ in range(repetitions):
        step()
    functions.disable()
    text = io.StringIO()
    pstats.Stats(functions, stream=text).strip_dirs().sort_stats("tottime").print_stats(25)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"attribution-profile-{case.kernel}-{case.dtype}-n{case.n}-{way}.txt"
    by_time = "self_cuda_time_total" if case.device != "cpu" else "self_cpu_time_total"
    path.write_text(
        f"{repetitions} training steps, {way}, n = {case.n}, {case.kernel}, {case.dtype}\n\n"
        f"{operators.key_averages().table(sort_by=by_time, row_limit=20)}\n{text.getvalue()}"
    )


def parts(found: Found) -> dict[str, float]:
    """Return the parts of the gain in seconds; they add up to it."""
    a, b, d = (found[name].p50 for name in (STOCK, NO_COPY, TENSORS))
    e, f, g = (found[name].p50 for name in (BARE, BARE_CLOSED, BARE_KERNEL))
    return {COPY: a - b, OPERATORS: (b - e) - (d - g), BACKWARD: e - f, KERNEL: f - g}


def _saved(found: Found, way: str = TENSORS) -> float:
    return found[STOCK].p50 - found[way].p50


def _of_gain(part: Callable[[Found], float]) -> Cell:
    return lambda row, found: f"{milliseconds(part(found))} ({percent(part(found) / _saved(found))})"


tables = partial(
    case_tables,
    title=titled(TITLE),
    columns=N
    | {f"{way} (ms)": lambda row, found, way=way: milliseconds(found[way].p50) for way in (STOCK, TENSORS)}
    | {"gain (ms)": lambda row, found: milliseconds(_saved(found))}
    | {f"{name} (ms)": _of_gain(lambda found, name=name: parts(found)[name]) for name in PARTS}
    | {f"{LOG_PROB} (ms)": _of_gain(lambda found: _saved(found, LOG_PROB))},
    caption="Differences of medians of variants run in turn, and their share of the gain; a negative part was lost, "
    f"not gained. The four parts add up to the gain; {LOG_PROB}, which is what upstream's pull request #2682 does, "
    "gains that much by itself.",
)


def _largest_parts(gains: dict[Case, Found]) -> str:
    """Return which part is the largest for which n."""
    spans: list[tuple[str, list[int]]] = []
    for case, found in gains.items():
        name = max(parts(found).items(), key=lambda part: part[1])[0]
        if not spans or spans[-1][0] != name:
            spans.append((name, []))
        spans[-1][1].append(case.n)
    return listed([f"{name} at n = {listed_n(sizes)}" for name, sizes in spans])


def remarks(rows: list[Row]) -> list[str]:
    """Return a paragraph for each kernel and data type, to be quoted: the answer in words and measured numbers."""
    return [_remark(group) for group in grouped(sorted(rows, key=lambda row: row.case.n), setting).values()]


def _remark(rows: list[Row]) -> str:
    cases = by_case(rows)
    gains = {case: found for case, found in cases.items() if _saved(found) > 0}
    said = f"Where a training step's time goes ({describe(rows[0])}):"
    if len(gains) < len(cases):
        said += f" at n = {listed_n([case.n for case in cases if case not in gains])} the flag gains nothing."
    if not gains:
        return said

    def of_gain(name: str) -> str:
        return listed([percent(parts(found)[name] / _saved(found)) for found in gains.values()])

    factors = listed([times(ratio(found[STOCK], found[TENSORS])) for found in gains.values()])
    copies = [parts(found)[COPY] / found[STOCK].p50 for found in gains.values()]
    pull_request = [_saved(found, LOG_PROB) / _saved(found) for found in gains.values()]
    return (
        f"{said} at n = {listed_n([case.n for case in gains])} a step on tensors is {factors} times as fast as stock "
        f"GPyTorch's. Of the time saved, {of_gain(OPERATORS)} is overhead of Python and operators, "
        f"{of_gain(BACKWARD)} the closed-form backward through Cholesky in place of autograd's, {of_gain(KERNEL)} the "
        f"kernel's closed-form gradient, and {of_gain(COPY)} the copy after Cholesky. The largest part is "
        f"{_largest_parts(gains)}. Without the copy and nothing else changed, stock saves {span(copies, percent)} of "
        f"its step. `log_prob` alone on tensors, as in pull request #2682, saves {span(pull_request, percent)} of what "
        "the whole step on tensors saves. Negative shares are losses; a few per cent either way are within the noise "
        "of differences of medians."
    )


def _panels(rows: list[Row]) -> list[Panel]:
    cases = by_case(rows)
    shares = {
        name: Curve([case.n for case in cases], [parts(found)[name] / found[STOCK].p50 for found in cases.values()])
        for name in PARTS
    }
    label = "Share of the flag-off step saved"
    return [Panel(label, shares, is_log=False, form=PercentFormatter(1), reference=0)]


pictures = partial(curve_pictures, title=lambda row: f"{TITLE}\n{describe(row)}", panels=_panels)
