"""Work in a process of its own: a case that run.py measures, a peak, a loop of Ax's.

What the C library does with freed memory depends on the largest block that the process has freed so far: matrices that
are larger than that go back to the system and are faulted in again at the next step. At n = 500 that tells in stock's
time, and what was measured before would decide whether it is there.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stdout
from importlib import import_module
from io import StringIO
from multiprocessing import active_children, get_context
from typing import Any
from unittest.mock import patch

import torch

from .options import Options
from .rows import Case, Row


def run_apart(work: Callable[..., Any], *arguments: object, environment: dict[str, str] | None = None) -> Any:
    """Return what `work` returns in a fresh process, on as many threads of torch.

    :param work: A function of a module's top level.
    :param arguments: What it is called with.
    :param environment: Variables that the process finds set when it loads its libraries.
    """
    # An interrupt from the keyboard reaches both processes; one of them is enough to deal with it.
    ignore = (signal.SIGINT, signal.SIG_IGN)
    with (
        patch.dict(os.environ, environment or {}),
        ProcessPoolExecutor(1, get_context("spawn"), signal.signal, ignore) as pool,
    ):
        try:
            return pool.submit(_on_threads, torch.get_num_threads(), work, arguments).result()
        except KeyboardInterrupt:
            for child in active_children():
                child.terminate()
            raise


def _on_threads(threads: int, work: Callable[..., Any], arguments: tuple) -> Any:
    torch.set_num_threads(threads)
    return work(*arguments)


def _measure(question: str, case: Case, options: Options) -> tuple[list[Row], str]:
    with redirect_stdout(StringIO()) as said:
        rows = import_module(question).measure(case, options, lambda fraction: None)
    return rows, said.getvalue().strip()


def measure_apart(question: str, case: Case, options: Options) -> tuple[list[Row], str]:
    """Return the rows of a case, and what was said meanwhile.

    :param question: The name of the question's module.
    :param case: What to measure.
    :param options: What the run was asked for.
    """
    return run_apart(_measure, question, case, options)
