"""What a user gains, in a dozen lines: each is the latest of the recorded rows that answer it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from .questions import ax
from .shared.rows import Row, read
from .shared.tables import Table, listed, markdown_table
from .shared.ways import STOCK, TENSORS

TITLE = "How many times as fast, or as small in memory"


@dataclass(frozen=True)
class Line:
    """A line of the table.

    :param what: What is measured, as a user would say it.
    :param question: The question whose rows answer it.
    :param mode: The rows' mode.
    :param sizes: The numbers of training points.
    :param case: The rows' case; None takes any.
    :param m: The number of test points; None takes any.
    :param key: What of a row is compared: "p50", a time, or another of its fields.
    """

    what: str
    question: str
    mode: str
    sizes: tuple[int, ...]
    case: str | None = "synthetic"
    m: int | None = None
    key: str = "p50"

    def pairs(self, rows: Iterable[Row]) -> list[tuple[Row, Row]]:
        """Return stock's latest row, and that with the flag on, for each number of points on record."""
        found = []
        for n in self.sizes:
            chosen = [row for row in rows if self._answers(row) and row.case.n == n]
            if chosen:
                latest = max(chosen, key=lambda row: row.date)
                of_way = {row.provider: row for row in chosen if row.conditions() == latest.conditions()}
                if of_way.keys() >= {STOCK, TENSORS}:
                    found.append((of_way[STOCK], of_way[TENSORS]))
        return found

    def _answers(self, row: Row) -> bool:
        case = row.case
        return (
            row.mode == self.mode
            and (self.case is None or case.case == self.case)
            and (self.m is None or case.m == self.m)
            and (case.dtype, case.kernel, case.batch, case.device) == ("float64", "rbf", 1, "cpu")
        )


Q_LOG_NEI = "qLogNEI of 16 x 1 points, with gradient"
LINES = (
    Line("a training step", "train", "step", (20, 100, 500, 2000)),
    Line("its peak memory", "memory", "step", (3000,), key="peak_memory"),
    Line("a step on Cholesky, over one on conjugate gradients", "threshold", "step", (1000, 2000, 4000, 6000)),
    Line("a first prediction at 100 points", "predict", "first call", (100, 1000), m=100),
    Line("a later one", "predict", "later call", (100, 1000), m=100),
    Line("BoTorch: a fit of one output", "bo", "fit_gpytorch_mll", (30, 100, 200, 300), None),
    Line("BoTorch: of two outputs", "bo", "fit_gpytorch_mll, 2 outputs", (30, 100, 200, 300), None),
    Line("BoTorch: qLogNEI of 16 points, 40 of those observed kept", "bo", f"{Q_LOG_NEI}, 40 kept", (200, 500), None),
    Line("BoTorch: the same, only what may be best kept", "bo", Q_LOG_NEI, (200, 500), None),
    Line("BoTorch: knowledge gradient", "bo", "qKG of 16 x 1 points, with gradient", (200, 500), None),
    Line("Ax: a loop of 14 trials, one objective", "ax", ax.OTHERS, (14,), ax.ONE),
    Line("Ax: two objectives", "ax", ax.OTHERS, (14,), ax.TWO),
)


def text(results: Path) -> str:
    """Return the table, and below it the conditions of its lines.

    :param results: The folder of the recorded rows.
    """
    lines: list[list[str]] = []
    measured: dict[str, dict[str, list[Row]]] = {}  # the rows of each line, by machine
    for line in LINES:
        pairs = line.pairs(read(results / f"{line.question}.json"))
        if not pairs:
            continue
        ratios = [getattr(stock, line.key) / getattr(tensors, line.key) for stock, tensors in pairs]
        sizes = ", ".join(f"{stock.case.n:,}" for stock, _ in pairs)
        gained = ", ".join(f"{ratio:.2g}" if ratio < 99.5 else f"{ratio:,.0f}" for ratio in ratios)
        lines.append([line.what, sizes, gained])
        for stock, _ in pairs:
            measured.setdefault(stock.machine["cpu"], {}).setdefault(line.what, []).append(stock)
    said = [_said(machine, of_line, named=len(measured) > 1) for machine, of_line in measured.items()]
    caption = f"Stock / flag on: medians, float64, two cores, torch 2.13, in turn in one process. {'; '.join(said)}."
    return markdown_table(Table(TITLE, ["", "n", "stock / flag on"], lines, caption))


def _said(machine: str, of_line: dict[str, list[Row]], named: bool) -> str:
    rows = sorted((row for rows in of_line.values() for row in rows), key=lambda row: row.date)
    commits = listed(list(dict.fromkeys(row.commit for row in rows)))
    dates = listed(list(dict.fromkeys(row.date.partition(" ")[0] for row in rows)))
    said = f"{machine}, {commits}, {dates}"
    return f"{', '.join(of_line)}: {said}" if named else said
