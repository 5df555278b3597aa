"""Answer a question: measure what the record does not hold yet, keep it, show it. All commands come here."""

from __future__ import annotations

import math
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, partial
from importlib import import_module
from pathlib import Path
from threading import current_thread, main_thread
from time import monotonic
from types import FrameType, ModuleType

import psutil
import torch
from rich.progress import Progress, TaskID

from . import rows as record
from .apart import measure_apart
from .machine import release, stamp
from .options import InputError, Options
from .rows import Case, Row
from .tables import print_table, progress, say

BUSY = 0.5  # load average at which something else is running


def _describe(case: Case) -> str:
    batch = f" x {case.batch}" if case.batch > 1 else ""
    return f"{case.question} {case.case} n={case.n}{batch} {case.dtype}"


def _advance(bars: Progress, task: TaskID, fraction: float) -> None:
    bars.update(task, completed=int(100 * fraction))


@cache
def _warn_if_busy() -> None:
    """Once: from then on the load is the run's own."""
    load = psutil.getloadavg()[0]
    if load > BUSY:
        say(f"Other processes keep this machine busy (load average {load:.1f}); the times will show it.")


@contextmanager
def _interrupts() -> Iterator[list[int]]:
    """Note interrupts, too: one that comes while a library has called back into Python is otherwise lost."""
    noted: list[int] = []
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler or current_thread() is not main_thread():
        yield noted
        return

    def note(number: int, frame: FrameType | None) -> None:
        noted.append(number)
        signal.default_int_handler(number, frame)

    signal.signal(signal.SIGINT, note)
    try:
        yield noted
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _chosen(cases: list[Case], words: tuple[str, ...] | None) -> list[Case]:
    """Return the cases whose name has one of `words` in it."""
    if words is None:
        return cases
    chosen = [case for case in cases if any(word.lower() in case.case.lower() for word in words)]
    if cases and not chosen:
        names = "; ".join(dict.fromkeys(case.case for case in cases))
        raise InputError(f"No case is called anything with {' or '.join(words)} in it; there are {names}.")
    return chosen


def answer(question: ModuleType, options: Options, until: float = math.inf) -> list[Row]:
    """Return the rows that answer `question`, measuring those that are not on record under the present conditions.

    :param question: The question's module.
    :param options: What the run was asked for.
    :param until: When no further case is begun, on the clock of `time.monotonic`; what is left out is named.
    """
    name = question.__name__.rsplit(".", 1)[-1]
    path = options.output / f"{name}.json"
    cases = _chosen(question.cases(options), options.only)
    recorded = record.read(path)
    # Not where it would cost more than it is worth: a quick run, and CUDA, whose context takes seconds and whose memory
    # torch keeps.
    is_apart = torch.device(options.device).type == "cpu" and not options.quick
    _warn_if_busy()
    answered: list[Row] = []
    with progress() as bars, _interrupts() as interrupts:
        overall = bars.add_task(name, total=len(cases))
        for case in cases:
            now = Row(case, provider="", mode="", **stamp(case.device))
            known = [] if options.fresh else record.recall(recorded, case, now)
            if not known and monotonic() > until:
                say(f"{_describe(case)}: left out, as the time is up.")
            elif not known:
                current = bars.add_task(_describe(case), total=None if is_apart else 100)
                if is_apart:
                    known, said = measure_apart(question.__name__, case, options)
                    for line in said.splitlines():
                        say(line)
                else:
                    known = question.measure(case, options, partial(_advance, bars, current))
                bars.remove_task(current)
                recorded = record.supersede(recorded, known)
                record.write(path, recorded)
                release(case.device)
            if interrupts:
                raise KeyboardInterrupt
            answered += known
            bars.advance(overall)
    return answered


def question_called(name: str) -> ModuleType:
    """Return the question's module."""
    return import_module(f"benchmarks.questions.{name}")


def remarks_of(question: ModuleType, rows: list[Row]) -> list[str]:
    """Return what the question has to say about `rows`."""
    return question.remarks(rows) if hasattr(question, "remarks") else []


def pictures_of(question: ModuleType, rows: list[Row], folder: Path) -> list[Path]:
    """Draw the question's pictures of `rows`, if it has any, and return where they are."""
    return question.pictures(rows, folder) if hasattr(question, "pictures") else []


def show(question: ModuleType, rows: list[Row], options: Options) -> None:
    """Print the tables and remarks that `rows` make, and draw the pictures of all rows on record beside them."""
    if not rows:
        return say("Nothing was measured.")
    for table in question.tables(rows):
        print_table(table)
    for remark in remarks_of(question, rows):
        say(remark)
    path = options.output / f"{rows[0].case.question}.json"
    written = [path, *pictures_of(question, record.read(path), options.output)]
    say("Written: " + ", ".join(map(str, written)))
