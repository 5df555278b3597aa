"""Cases and rows, the one schema of everything that is measured: picking them, and keeping them on disk."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Hashable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from .options import InputError

VERSIONS_THAT_MATTER = ("python", "torch", "gpytorch", "linear_operator", "overlay")


@dataclass(frozen=True)
class Case:
    """What is measured together, its providers in turn."""

    question: str  # the module that asks
    case: str  # the data set or problem
    n: int  # number of training points
    d: int  # number of inputs
    dtype: str  # "float32" or "float64"
    device: str  # "cpu" or "cuda"
    kernel: str = "rbf"  # "rbf" or "matern"
    batch: int = 1  # number of models in a batch; 1 is no batch
    m: int = 0  # number of test points; 0 where there are none
    settings: str = ""  # whatever else decides the result, as text


@dataclass(frozen=True)
class Row:
    """One provider's result in one mode of a case.

    :param p20: 20 % quantile of the time in seconds, or None where time was not the question; likewise `p50`, `p80`.
    """

    case: Case  # what was measured
    provider: str  # who did it ("stock" is the flag off, "tensors" the flag on)
    mode: str  # what was done: "step", "first call", ...
    p20: float | None = None
    p50: float | None = None
    p80: float | None = None
    peak_memory: int | None = None  # peak of the memory allocated on top of what was there before, in bytes
    values: dict[str, Any] = field(default_factory=dict)  # results other than time, by name
    versions: dict[str, str] = field(default_factory=dict)
    machine: dict[str, Any] = field(default_factory=dict)
    commit: str = ""
    date: str = ""

    def as_dict(self) -> dict[str, Any]:
        """Return the row as one flat dictionary."""
        flat = asdict(self)
        return {**flat.pop("case"), **flat}

    @classmethod
    def from_dict(cls, flat: dict[str, Any]) -> Row:
        """Return the row that :meth:`as_dict` made `flat` of."""
        rest = dict(flat)
        case = Case(**{name: rest.pop(name) for name in Case.__dataclass_fields__})
        return cls(case=case, **rest)

    def conditions(self) -> tuple:
        """Return what has to be the same for two rows of one case to be comparable: machine, versions, code."""
        versions = tuple(self.versions.get(name) for name in VERSIONS_THAT_MATTER)
        return (self.commit, versions, machine_of(self))


Found = dict[str, Row]  # the rows of one case and mode, by provider


def grouped(rows: list[Row], key: Callable[[Row], Hashable]) -> dict[Hashable, list[Row]]:
    """Return `rows` by `key`, in the order in which the keys first come up."""
    groups: dict[Hashable, list[Row]] = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    return groups


def machine_of(row: Row) -> tuple:
    """Return the machine of `row` as something that can be a key."""
    return tuple(sorted(row.machine.items()))


def setting(row: Row) -> tuple:
    """Return what the lines of a table have in common: machine, data type, kernel, settings."""
    return (row.case.device, machine_of(row), row.case.dtype, row.case.kernel, row.case.settings)


def setting_and_mode(row: Row) -> tuple:
    """Return :func:`setting` and the mode."""
    return (*setting(row), row.mode)


def by_case(rows: list[Row]) -> dict[Case, Found]:
    """Return rows of one mode by their case, and each case's by their provider."""
    cases = grouped(rows, lambda row: row.case)
    return {case: {row.provider: row for row in together} for case, together in cases.items()}


def by_provider(rows: list[Row]) -> dict[str, list[Row]]:
    """Return `rows` by their provider."""
    return grouped(rows, lambda row: row.provider)


def read(path: Path) -> list[Row]:
    """Return the rows in the file at `path`; none if there is no file."""
    if not path.exists():
        return []
    try:
        return [Row.from_dict(flat) for flat in json.loads(path.read_text())]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{path} does not hold benchmark rows ({error}); move it away, or give another --output."
        ) from None


def recall(rows: list[Row], case: Case, now: Row) -> list[Row]:
    """Return those of `rows` that answer `case` under the conditions of `now`: same machine, versions and commit."""
    return [row for row in rows if row.case == case and row.conditions() == now.conditions()]


def write(path: Path, rows: list[Row]) -> None:
    """Write `rows` to `path`, one a line, so that an interruption leaves the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(".part")
    draft.write_text("[\n" + ",\n".join(json.dumps(row.as_dict()) for row in rows) + "\n]\n")
    os.replace(draft, path)


def supersede(rows: list[Row], new: list[Row]) -> list[Row]:
    """Return `rows` with those of the same case and machine replaced by `new`, whatever commit they were of."""
    replaced = {(row.case, machine_of(row)) for row in new}
    return [row for row in rows if (row.case, machine_of(row)) not in replaced] + new
