"""Peak memory of a piece of work, for all questions: what torch's allocators are asked for, temporaries included."""

from __future__ import annotations

import gc
import json
import tempfile
import tracemalloc
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from .apart import run_apart
from .machine import synchronize

STATUS = Path("/proc/self/status")


def peak_bytes(work: Callable[[], object], device: str) -> int:
    """Return the peak of what `work` allocates on `device` on top of what was there, in bytes."""
    return max(trace_bytes(work, device), default=0)


def trace_bytes(work: Callable[[], object], device: str) -> list[int]:
    """Return what `work` holds on `device` after each allocation and release, in bytes; on CUDA its peak and its end.

    The resident set of the process is too coarse for this: allocators keep what was freed.
    """
    gc.collect()
    if torch.device(device).type == "cuda":
        synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        synchronize(device)
        return [torch.cuda.max_memory_allocated(device) - before, torch.cuda.memory_allocated(device) - before]
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    allocations = sorted((event for event in events if event.get("name") == "[memory]"), key=lambda event: event["ts"])
    return list(accumulate(event["args"]["Bytes"] for event in allocations))


def python_peak_bytes(work: Callable[[], object]) -> int:
    """Return the peak of what `work` allocates outside torch: NumPy's arrays (SciPy's work space among them)."""
    gc.collect()
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def resident_peaks(prepare: Callable[..., Callable[[], object]], *arguments: object) -> tuple[int, int] | None:
    """Return the largest resident set of a fresh process before and after some work, in bytes; None if not on Linux.

    Before: with the libraries loaded and the work prepared. A process keeps what it once took, so this is one of its
    own.

    :param prepare: A function of a module's top level, which returns the work when it is called with `arguments`.
    """
    if not STATUS.exists():
        return None
    return run_apart(_resident_peaks, prepare, arguments)


def _resident_peaks(prepare: Callable, arguments: tuple) -> tuple[int, int]:
    work = prepare(*arguments)
    before = _largest_resident()
    work()
    return before, _largest_resident()


def _largest_resident() -> int:
    # Not getrusage's, which a new process on Linux takes over from its parent.
    (line,) = [line for line in STATUS.read_text().splitlines() if line.startswith("VmHWM:")]
    return int(line.split()[1]) * 1024
