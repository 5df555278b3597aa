"""How often does a step wait for the device, and how much does it launch there?

Waits are counted twice: by torch's warnings of its own synchronizing operations, and by the calls of the CUDA runtime
that wait, which sees those inside libraries, too. Without CUDA there are torch's operators alone to be counted.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from functools import partial

import torch
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile

from ..shared.machine import stamp, synchronize
from ..shared.measuring import Advance, cases_of, with_room
from ..shared.models import mean_and_variance, model_of, test_points_of, training_step
from ..shared.options import DTYPES, Options
from ..shared.rows import Case, Row, setting_and_mode
from ..shared.tables import WAY, N, case_tables, say, titled
from ..shared.ways import STOCK, TENSORS, run_in

TITLE = "Launches and waits"
STEP, PREDICTION = "training step", "prediction, later call"
TEST_POINTS = 100
LAUNCHES, WAITS, COPIES = "kernel launches", "waits", "copies and fills"
RUNTIME = {
    LAUNCHES: ("cudaLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernel", "cuLaunchKernelEx", "cudaGraphLaunch"),
    WAITS: ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "cuStreamSynchronize"),
    COPIES: ("cudaMemcpyAsync", "cudaMemcpy", "cudaMemsetAsync", "cudaMemset"),
}
OPERATORS, WARNED = "operators", "synchronizing operators"
COUNTS = (OPERATORS, LAUNCHES, COPIES, WARNED, WAITS)
WARNING = "called a synchronizing CUDA operation"


def cases(options: Options) -> list[Case]:
    dtypes = ("float64",) if options.quick else tuple(DTYPES)
    return cases_of("launches", options, (50, 200, 1000), (50, 200), dtypes, m=TEST_POINTS, settings="")


def count_runtime_calls(names: Iterable[str]) -> dict[str, int]:
    """Return how many of a profile's events, given by their names, are launches, waits and copies."""
    seen = Counter(names)
    return {what: sum(seen[name] for name in calls) for what, calls in RUNTIME.items()}


def count_operators(events: Iterable[tuple[str, bool]]) -> int:
    """Return how many operators of torch's were called, not counting those that others called.

    :param events: Each event's name, and whether it lies inside another operator.
    """
    return sum(name.startswith("aten::") and not inside for name, inside in events)


def count_warnings(messages: Iterable[str]) -> int:
    """Return how many warnings are torch's of a synchronizing operation."""
    return sum(WARNING in message for message in messages)


def _events(work: Callable[[], object], device: str) -> list[FunctionEvent]:
    on_cuda = torch.device(device).type == "cuda"
    synchronize(device)
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_cuda else [])]) as profiler:
        work()  # and no synchronization of ours, which would be counted
    return list(profiler.events())


def _counts(work: Callable[[], object], device: str) -> dict[str, int]:
    """Return what one run of `work` did, after runs that may fill caches."""
    for _ in range(2):
        work()
    events = _events(work, device)
    inside = [event.cpu_parent is not None and event.cpu_parent.name.startswith("aten::") for event in events]
    counts = {OPERATORS: count_operators((event.name, within) for event, within in zip(events, inside, strict=True))}
    if torch.device(device).type != "cuda":
        return counts
    # The profiler waits for the device, too, when it ends.
    calls, idle = (
        count_runtime_calls(event.name for event in seen) for seen in (events, _events(lambda: None, device))
    )
    counts |= {what: count - idle[what] for what, count in calls.items()}
    synchronize(device)
    mode = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            work()
        finally:
            torch.cuda.set_sync_debug_mode(mode)
    return counts | {WARNED: count_warnings(str(warning.message) for warning in caught)}


@with_room()
def measure(case: Case, options: Options, advance: Advance) -> list[Row]:
    """Count what a training step and a prediction do, both ways."""
    if torch.device(case.device).type != "cuda":
        say(f"launches, n = {case.n:,}: {', '.join(COUNTS[1:])} are left out: {case.device} has none.")
    rows, test_x = [], test_points_of(case)
    for way in (STOCK, TENSORS):
        works = {
            STEP: training_step(model_of(case)),
            PREDICTION: partial(mean_and_variance, model_of(case).eval(), test_x),
        }
        for mode, work in works.items():
            rows.append(Row(case, way, mode, values=_counts(run_in(way, work), case.device), **stamp(case.device)))
            advance(len(rows) / 4)
    return rows


tables = partial(
    case_tables,
    title=titled(TITLE, with_mode=True),
    columns=N
    | WAY
    | {what: lambda row, found, what=what: f"{row.values[what]:,}" if what in row.values else "-" for what in COUNTS},
    caption=f"Of one {STEP} (zero_grad, forward, backward), or one prediction of mean and variance at {TEST_POINTS} "
    f"points. {OPERATORS.capitalize()}: of torch, called by Python or autograd. {WARNED.capitalize()}: torch's own "
    f"count; {WAITS}: calls of the CUDA runtime that wait, libraries' among them. A dash: not to be counted here.",
    key=setting_and_mode,
    ways=(STOCK, TENSORS),
)
