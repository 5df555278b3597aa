"""From variants to rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from . import peak
from .machine import available_bytes, stamp
from .options import DTYPES, Options
from .row import Case, Row
from .show import say
from .timing import Variant, in_turn, spread


def rows_in_turn(
    case: Case,
    mode: str,
    variants: dict[str, Variant],
    options: Options,
    advance: Callable[[float], None],
    values: dict[str, dict[str, Any]] | None = None,
    with_memory: bool = True,
    least: int = 5,
) -> list[Row]:
    """Run the variants in turn and return a row for each, with its peak memory (of a run of its own).

    :param case: What is measured.
    :param mode: What is done.
    :param variants: Who does it.
    :param options: Says how long to go on.
    :param advance: Is told what fraction is done.
    :param values: Results other than time, by provider.
    :param with_memory: Whether to look at memory; following the allocations of a long run takes longer than the run.
    :param least: At least so many rounds.
    """
    peaks = {}
    for provider, variant in variants.items() if with_memory else ():
        variant.prepare()
        peaks[provider] = peak.peak_bytes(variant.run, case.device)
    times = in_turn(variants, case.device, options.seconds, advance, least)
    return [
        Row(
            case=case,
            provider=provider,
            mode=mode,
            **spread(times[provider]),
            peak_memory=peaks.get(provider),
            values=(values or {}).get(provider, {}),
            **stamp(case.device),
        )
        for provider in variants
    ]


def fits(case: Case, matrices: float, what: str = "") -> bool:
    """Return whether `matrices` n x n matrices fit into the free memory; if not, say so.

    :param case: Says how large they are.
    :param matrices: How many there are.
    :param what: What is left out (Default: the case).
    """
    needed = matrices * case.batch * case.n**2 * DTYPES[case.dtype].itemsize
    free = available_bytes(case.device)
    if needed > free:
        say(
            f"{case.question}, n = {case.n:,}, {case.dtype}: {what + ' is ' if what else ''}left out, as it needs "
            f"{needed / 2**30:.1f} GiB and {free / 2**30:.1f} are free."
        )
    return needed <= free


def does_fit(work: Callable[[], object]) -> bool:
    """Run `work` and return whether there was memory enough for it."""
    try:
        work()
    except torch.OutOfMemoryError:
        return False
    except RuntimeError as error:
        if "can't allocate memory" not in str(error):  # the CPU's allocator has no exception of its own
            raise
        return False
    return True
