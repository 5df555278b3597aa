"""What a run was asked for, which every question reads, and the error for what cannot be done."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import torch

DTYPES = {"float64": torch.float64, "float32": torch.float32}


class InputError(Exception):
    """Something the user gave cannot be used; the message is one line and says what to do."""


@dataclass(frozen=True)
class Options:
    """What the command line asked for; None leaves the choice to the question."""

    device: str = "cpu"
    dtypes: tuple[str, ...] | None = None
    sizes: tuple[int, ...] | None = None
    kernels: tuple[str, ...] | None = None
    only: tuple[str, ...] | None = None
    quick: bool = False
    data: Path | None = None
    sets: tuple[str, ...] | None = None
    split: int = 0
    csv: Path | None = None
    target: str | None = None
    steps: int | None = None
    minutes: int | None = None
    memory: tuple[float, ...] | None = None
    output: Path = Path("build/benchmarks")
    fresh: bool = False

    @property
    def seconds(self) -> float:
        """How long the variants of one case are run in turn."""
        return 0.8 if self.quick else 8.0

    @property
    def effort(self) -> str:
        """Rows of a quick run do not stand in for those of a full one."""
        return "quick" if self.quick else "full"

    def choose(self, name: str, default: tuple, quick: tuple | None = None) -> tuple:
        """Return the option called `name`, or what the question has for it, which may have less for a quick run."""
        given = getattr(self, name)
        return given if given is not None else quick if self.quick and quick is not None else default

    def grid(
        self, sizes: tuple, dtypes: tuple[str, ...] = ("float64",), kernels: tuple[str, ...] = ("rbf",)
    ) -> Iterator[tuple]:
        """Yield kernel, data type and size of each case, of sizes that are chosen already."""
        return product(self.choose("kernels", kernels), self.choose("dtypes", dtypes), sizes)
