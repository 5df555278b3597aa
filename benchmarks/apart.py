"""Measure a case in a process of its own.

What the C library does with freed memory depends on the largest block that the process has freed so far: matrices that
are larger than that go back to the system and are faulted in again at the next step. At n = 500 that tells in stock's
time, and what was measured before would decide whether it is there.
"""

from __future__ import annotations

import signal
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stdout
from importlib import import_module
from io import StringIO
from multiprocessing import active_children, get_context

import torch

from .options import Options
from .row import Case, Row


def _measure(question: str, case: Case, options: Options, threads: int) -> tuple[list[Row], str]:
    torch.set_num_threads(threads)
    with redirect_stdout(StringIO()) as said:
        rows = import_module(question).measure(case, options, lambda fraction: None)
    return rows, said.getvalue().strip()


def measure_apart(question: str, case: Case, options: Options) -> tuple[list[Row], str]:
    """Return the rows of a case, and what was said meanwhile.

    :param question: The name of the question's module.
    :param case: What to measure.
    :param options: What the run was asked for.
    """
    # An interrupt from the keyboard reaches both processes; one of them is enough to deal with it.
    quiet = {"initializer": signal.signal, "initargs": (signal.SIGINT, signal.SIG_IGN)}
    with ProcessPoolExecutor(1, mp_context=get_context("spawn"), **quiet) as pool:
        try:
            return pool.submit(_measure, question, case, options, torch.get_num_threads()).result()
        except KeyboardInterrupt:
            for child in active_children():
                child.terminate()
            raise
