"""Times of several variants, run in turn in one process, so that a slow minute of the machine slows them all."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter

import numpy as np
import torch

SETTLE = 0.03  # how long a turn runs without timing, in seconds; beside a run of more than a second that is nothing


@dataclass(frozen=True)
class Variant:
    """One way of doing the same work.

    :param run: The work.
    :param prepare: What has to happen before each run and is not timed.
    """

    run: Callable[[], object]
    prepare: Callable[[], object] = lambda: None


def synchronize(device: str) -> None:
    """Wait until `device` has done what it was given."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def timed(work: Callable[[], object], device: str) -> float:
    """Return the seconds that `work` takes on `device`."""
    synchronize(device)
    start = perf_counter()
    work()
    synchronize(device)
    return perf_counter() - start


def in_turn(
    variants: dict[str, Variant],
    device: str,
    seconds: float,
    advance: Callable[[float], None] = lambda fraction: None,
    least: int = 5,
    most: int = 100,
) -> dict[str, list[float]]:
    """Run the variants in turn (a, b, a, b, ...) and return the times of each, in seconds.

    A turn begins with runs that are not timed: where the variants use different thread pools (MKL's, OpenBLAS's,
    JAX's), the threads of the one before still spin for some milliseconds. Then it times a run, or as many as fit into
    the same while.

    :param variants: What to run, by provider.
    :param device: The device to wait for.
    :param seconds: About how long to go on.
    :param advance: Is told what fraction of the rounds is done.
    :param least: At least so many rounds.
    :param most: At most so many rounds.
    """

    def once(variant: Variant) -> float:
        variant.prepare()
        return timed(variant.run, device)

    def several(variant: Variant) -> list[float]:
        end = perf_counter() + SETTLE  # of the clock on the wall: of a short run the most is spent around it
        runs = [once(variant)]
        while perf_counter() < end:
            runs.append(once(variant))
        return runs

    warm = {provider: several(variant)[-1] for provider, variant in variants.items()}
    turns = sum(2 * max(SETTLE, run) if run < 1 else run for run in warm.values())
    rounds = int(np.clip(seconds / turns, least, most))
    times: dict[str, list[float]] = {provider: [] for provider in variants}
    for done in range(rounds):
        for provider, variant in variants.items():
            if warm[provider] < 1:
                several(variant)
            times[provider] += several(variant)
        advance((done + 1) / rounds)
    return times


def spread(times: list[float]) -> dict[str, float]:
    """Return the quantiles of `times` under the names of a row's fields."""
    return {f"p{percent}": float(np.percentile(times, percent)) for percent in (20, 50, 80)}
