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
from pathlib import Path

import torch
from torch.nn.functional import softplus
from torch.profiler import ProfilerActivity, profile

import gpytorch

from ..shared import bare, plot
from ..shared.against_n import describe, file_name
from ..shared.agreement import check_same, noted
from ..shared.compare import case_tables
from ..shared.measuring import fits, rows_in_turn
from ..shared.models import ExactGP, dense_at_every_n, loss_and_gradient, model_of, training_step
from ..shared.options import Options
from ..shared.row import Case, Row
from ..shared.rows import by_case, grouped, setting
from ..shared.show import Table, listed, milliseconds, percent, ratio, times
from ..shared.timing import Variant
from ..shared.ways import LOG_PROB, NO_COPY, STOCK, TENSORS, run_in
from .train import STOCK_MATRICES, D, steps_that_agree

TITLE = "Where the gain comes from"
BARE, BARE_CLOSED, BARE_KERNEL = "plain torch", "plain torch, closed-form backward", "plain torch, closed-form kernel"
COPY, OPERATORS, BACKWARD, KERNEL = "copy after Cholesky", "Python and operators", "closed-form backward", "kernel"
PARTS = (COPY, OPERATORS, BACKWARD, KERNEL)
NOISE_FLOOR = 1e-4  # GaussianLikelihood's lower bound of the noise


def cases(options: Options) -> list[Case]:
    """Return one case for each kernel, data type and n."""
    sizes = options.choose("sizes", (20, 100, 200, 500, 1000, 2000), quick=(20, 100, 500, 1000))
    return [
        Case("attribution", "synthetic", n, D, dtype, options.device, kernel, settings=options.effort)
        for kernel, dtype, n in options.grid(sizes, kernels=("rbf",) if options.quick else ("rbf", "matern"))
    ]


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


def _bare_steps(case: Case) -> tuple[dict[str, Callable[[], torch.Tensor]], dict[str, torch.Tensor]]:
    """Return the steps in plain torch, and the loss and gradient of each."""
    model = model_of(case)
    bares = {name: _Bare(model, case.kernel) for name in (BARE, BARE_CLOSED, BARE_KERNEL)}
    steps = {
        BARE: lambda: bares[BARE].step(bare.by_autograd),
        BARE_CLOSED: lambda: bares[BARE_CLOSED].step(gpytorch.functions.TensorInvQuadLogdet.apply),
        BARE_KERNEL: bares[BARE_KERNEL].closed_form_step,
    }
    return steps, {name: loss_and_gradient(bares[name], step) for name, step in steps.items()}


def measure(case: Case, options: Options, advance: Callable[[float], None]) -> list[Row]:
    """Time all variants in turn; write the profiles of stock and tensors into the output folder."""
    if not fits(case, STOCK_MATRICES):
        return []
    with dense_at_every_n():
        variants, values = steps_that_agree(case, (STOCK, NO_COPY, LOG_PROB, TENSORS))
        model = model_of(case)
        reference = {STOCK: loss_and_gradient(model, run_in(STOCK, training_step(model)))}
        steps, results = _bare_steps(case)
        distances = check_same(reference | results, case.dtype, f"loss and gradient in plain torch, n = {case.n}")
        values |= noted(distances)
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


def parts(found: dict[str, Row]) -> dict[str, float]:
    """Return the parts of the gain in seconds; they add up to it."""
    a, b, d = (found[name].p50 for name in (STOCK, NO_COPY, TENSORS))
    e, f, g = (found[name].p50 for name in (BARE, BARE_CLOSED, BARE_KERNEL))
    return {COPY: a - b, OPERATORS: (b - e) - (d - g), BACKWARD: e - f, KERNEL: f - g}


def _gains(rows: list[Row]) -> dict[Case, dict[str, Row]]:
    """Return the rows of every case in which the flag gains something."""
    return {case: found for case, found in by_case(rows).items() if found[STOCK].p50 > found[TENSORS].p50}


def _saved(found: dict[str, Row], way: str = TENSORS) -> float:
    return found[STOCK].p50 - found[way].p50


def _lines(case: Case, found: dict[str, Row]) -> list[list[str]]:
    gain = _saved(found)
    of_it = [*parts(found).values(), _saved(found, LOG_PROB)]
    absolute = [milliseconds(seconds) for seconds in (found[STOCK].p50, found[TENSORS].p50, gain)]
    return [[f"{case.n:,}", *absolute, *(f"{milliseconds(part)} ({percent(part / gain)})" for part in of_it)]]


def tables(rows: list[Row]) -> list[Table]:
    """Return one table for each kernel and data type."""
    return case_tables(
        rows,
        lambda row: f"{TITLE}: {describe(row)}",
        ["n", "stock (ms)", "tensors (ms)", "gain (ms)", *(f"{part} (ms)" for part in PARTS), f"{LOG_PROB} (ms)"],
        _lines,
        "Differences of medians of variants run in turn, and their share of the gain; a negative part was lost, not "
        f"gained. The four parts add up to the gain; {LOG_PROB}, which is what upstream's pull request #2682 does, "
        "gains that much by itself.",
    )


def _largest_parts(gains: dict[Case, dict[str, Row]]) -> str:
    """Return which part is the largest for which n."""
    spans: list[tuple[str, list[int]]] = []
    for case, found in gains.items():
        name = max(parts(found).items(), key=lambda part: part[1])[0]
        if not spans or spans[-1][0] != name:
            spans.append((name, []))
        spans[-1][1].append(case.n)
    return listed([f"{name} at n = {listed([f'{n:,}' for n in sizes])}" for name, sizes in spans])


def remarks(rows: list[Row]) -> list[str]:
    """Return a paragraph for each kernel and data type, to be quoted: the answer in words and measured numbers."""
    said = []
    for group in grouped(sorted(rows, key=lambda row: row.case.n), setting).values():
        gains = _gains(group)
        without = [f"{case.n:,}" for case in by_case(group) if case not in gains]
        sentences = [f"Where a training step's time goes ({describe(group[0])}):"]
        if without:
            sentences.append(f"at n = {listed(without)} the flag gains nothing.")
        if not gains:
            said.append(" ".join(sentences))
            continue

        def of_gain(name: str, gains: dict[Case, dict[str, Row]] = gains) -> str:
            return listed([percent(parts(found)[name] / _saved(found)) for found in gains.values()])

        def span(shares: list[float]) -> str:
            return f"{percent(min(shares))} to {percent(max(shares))}"

        sizes = listed([f"{case.n:,}" for case in gains])
        factors = listed([times(ratio(found[STOCK], found[TENSORS])) for found in gains.values()])
        copies = [parts(found)[COPY] / found[STOCK].p50 for found in gains.values()]
        pull_request = [_saved(found, LOG_PROB) / _saved(found) for found in gains.values()]
        sentences += [
            f"at n = {sizes} a step on tensors is {factors} times as fast as stock GPyTorch's. Of the time saved,",
            f"{of_gain(OPERATORS)} is overhead of Python and operators, {of_gain(BACKWARD)} the closed-form backward",
            f"through Cholesky in place of autograd's, {of_gain(KERNEL)} the kernel's closed-form gradient, and",
            f"{of_gain(COPY)} the copy after Cholesky. The largest part is {_largest_parts(gains)}. Without the copy",
            f"and nothing else changed, stock saves {span(copies)} of its step. `log_prob` alone on tensors, as in",
            f"pull request #2682, saves {span(pull_request)} of what the whole step on tensors saves. Negative shares",
            "are losses; a few per cent either way are within the noise of differences of medians.",
        ]
        said.append(" ".join(sentences))
    return said


def pictures(rows: list[Row], folder: Path) -> list[Path]:
    """Plot the parts of the gain, relative to stock's time, against n."""
    paths = []
    for group in grouped(rows, setting).values():
        found = by_case(group)
        paths.append(
            plot.shares(
                [f"{case.n:,}" for case in found],
                {name: [parts(named)[name] / named[STOCK].p50 for named in found.values()] for name in PARTS},
                folder / file_name(group[0]),
                f"{TITLE}\n{describe(group[0])}",
                "Number of training points n",
                "Share of the flag-off step saved",
            )
        )
    return paths
