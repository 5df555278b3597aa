"""One schema for everything that is measured."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

VERSIONS_THAT_MATTER = ("python", "torch", "gpytorch", "linear_operator", "overlay")


@dataclass(frozen=True)
class Case:
    """What is measured together, its providers in turn.

    :param question: The module that asks.
    :param case: The data set or problem.
    :param n: Number of training points.
    :param d: Number of inputs.
    :param dtype: "float32" or "float64".
    :param device: "cpu" or "cuda".
    :param kernel: "rbf" or "matern".
    :param batch: Number of models in a batch; 1 is no batch.
    :param m: Number of test points; 0 where there are none.
    :param settings: Whatever else decides the result, as text.
    """

    question: str
    case: str
    n: int
    d: int
    dtype: str
    device: str
    kernel: str = "rbf"
    batch: int = 1
    m: int = 0
    settings: str = ""


@dataclass(frozen=True)
class Row:
    """One provider's result in one mode of a case.

    :param case: What was measured.
    :param provider: Who did it ("stock" is the flag off, "tensors" the flag on).
    :param mode: What was done: "step", "first call", ...
    :param p20: 20 % quantile of the time in seconds, or None where time was not the question; likewise `p50`, `p80`.
    :param peak_memory: Peak of the memory allocated on top of what was there before, in bytes.
    :param values: Results other than time, by name.
    """

    case: Case
    provider: str
    mode: str
    p20: float | None = None
    p50: float | None = None
    p80: float | None = None
    peak_memory: int | None = None
    values: dict[str, Any] = field(default_factory=dict)
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
        return (self.commit, versions, tuple(sorted(self.machine.items())))
