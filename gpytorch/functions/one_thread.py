"""Small work on one thread.

On several threads a small matrix is factorized no sooner than on one. Beside another library's threads it takes far
longer: those of the BLAS that SciPy's optimizers call go on spinning for a while after each call, and torch's wait for
the cores that they hold.

The number of threads is set for the calling thread alone, in OpenMP and in MKL: no other thread sees it, be it running
or started meanwhile, as it would see what :func:`torch.set_num_threads` writes.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from ctypes import PyDLL, c_int
from functools import cache, wraps
from pathlib import Path
from typing import TypeVar

import torch

# Up to matrices of so many rows LAPACK gains nothing from more threads, and the elementwise passes, which do, are a
# fifth of a training step: of one matrix it is as fast on one thread as on two, and of a batch of up to so many
# elements at most a sixth slower. Beside an optimizer that keeps a BLAS of its own at work, which it does for several
# outputs, it is up to five times as fast.
MOST_ROWS, MOST_ELEMENTS = 256, 2**18

T = TypeVar("T")
Setter = Callable[[int], int]


def on_one_thread(shape: Callable[..., torch.Size]) -> Callable[[Callable[..., T]], Callable[..., T]]:
    """Let a function run on one thread where it works on small matrices, and give the thread its numbers back.

    Results are those of several threads to rounding.

    :param shape: Returns the shape of the matrices' rows (... x N) that the function works on, given what that is
        called with.
    """

    def decorate(function: Callable[..., T]) -> Callable[..., T]:
        @wraps(function)
        def run(*args) -> T:
            if torch.compiler.is_compiling() or not _is_small(shape(*args)):
                return function(*args)
            return run_on_one_thread(function, *args)

        return run

    return decorate


def _is_small(shape: torch.Size) -> bool:
    return shape[-1] <= MOST_ROWS and shape.numel() * shape[-1] <= MOST_ELEMENTS


def run_on_one_thread(function: Callable[..., T], *args) -> T:
    """Return what a function returns, run on one thread.

    :param function: The function.
    :param args: What it is called with.
    """
    number = torch.get_num_threads()  # torch gives a thread its number when it first asks: here, not in the function
    setters = _setters() if number > 1 else None
    if setters is None:
        return function(*args)
    set_openmp, set_mkl = setters
    # An interrupt is raised after a call in Python's code, before what it returned has a name. An iterator that is
    # unpacked makes no such call; and each number has a `finally` of its own.
    try:
        set_openmp(1)
        (before,) = map(set_mkl, (1,))
        try:
            return function(*args)
        finally:
            set_mkl(before)
    finally:
        set_openmp(number)


@cache
def _setters() -> tuple[Setter, Setter] | None:
    # What sets this thread's number in the OpenMP that torch uses, and in its MKL, where it has one; None where no such
    # OpenMP is found. It is torch itself that must see the number: a process can hold several OpenMPs.
    if os.name != "posix":
        return None
    libraries = [PyDLL(None)]
    libraries += [PyDLL(str(path)) for path in (Path(torch.__file__).parent / "lib").glob("libtorch_cpu.*")]
    for library in libraries:
        set_openmp = _setter(library, "omp_set_num_threads")
        if set_openmp is not None and _is_seen(set_openmp):
            found = (_setter(each, "MKL_Set_Num_Threads_Local") for each in reversed(libraries))
            return set_openmp, next(filter(None, found), int)  # int sets nothing
    return None


def _setter(library: PyDLL, name: str) -> Setter | None:
    function = getattr(library, name, None)
    if function is not None:
        function.argtypes = [c_int]
    return function


def _is_seen(set_openmp: Setter) -> bool:
    number = torch.get_num_threads()
    try:
        set_openmp(1)
        return torch.get_num_threads() == 1
    finally:
        set_openmp(number)
