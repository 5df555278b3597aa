"""The releases that the suites ran on, as `python test/stacks` recorded it."""

from __future__ import annotations

import json
from pathlib import Path

from .shared.options import InputError
from .shared.show import Table

NAMES = {
    "python": "Python",
    "torch": "torch",
    "gpytorch": "GPyTorch",
    "linear_operator": "linear_operator",
    "botorch": "BoTorch",
    "numpy": "NumPy",
}
SUITES = {"suite": "this suite", "off": "GPyTorch's, flag off", "on": "GPyTorch's, flag on"}
CAPTION = (
    "Passed, and failed where GPyTorch alone does not; in brackets, what fails of GPyTorch's own tests without the "
    "overlay as well. Without a GPU. `python test/stacks`"
)


def read(path: Path) -> list[dict]:
    """Return the summaries in the file at `path`, a row of the table each."""
    if not path.exists():
        raise InputError("README.md asks for the releases that were tried, and none are on record.")
    return json.loads(path.read_text())


def _outcome(summary: dict, suite: str) -> str:
    passed, failed = summary["counts"][suite]["passed"], len(summary["failures"][suite])
    counts = summary["counts"][suite]
    stock = counts["failed"] + counts["errors"] - failed
    return f"{passed:,}, {failed}" + (f" ({stock})" if stock else "")


def table(summaries: list[dict]) -> Table:
    """Return the table of the releases that were tried.

    :param summaries: What `python test/stacks` recorded.
    """
    lines = [
        [
            *(summary["versions"][name].partition("+")[0] for name in NAMES),  # 2.13.0+cpu is 2.13.0
            *(_outcome(summary, suite) for suite in SUITES),
            f"{summary['date']}, {summary['commit']}",
        ]
        for summary in summaries
    ]
    return Table("Releases tried", [*NAMES.values(), *SUITES.values(), "date, commit"], lines, CAPTION)
