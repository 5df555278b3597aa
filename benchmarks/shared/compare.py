"""Tables with a line for each case, and pictures of cases that have no common axis."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from itertools import pairwise
from pathlib import Path

from . import plot
from .against_n import file_name
from .row import Case, Row
from .rows import by_case, grouped, setting
from .show import Table, ratio, software, time_with_spread
from .ways import STOCK, TENSORS

Lines = Callable[[Case, dict[str, Row]], list[list[str]]]


def case_tables(
    rows: list[Row],
    title: Callable[[Row], str],
    columns: list[str],
    lines: Lines,
    caption: str,
    key: Callable[[Row], Hashable] = setting,
) -> list[Table]:
    """Return one table for each setting.

    :param rows: Rows of one question.
    :param title: Makes the title of one of a table's rows.
    :param columns: The heads of the columns.
    :param lines: Makes the lines of a case, of the case and its rows by provider.
    :param caption: How to read it.
    :param key: What the rows of a table have in common.
    """
    return [
        Table(
            title(group[0]),
            columns,
            [line for case, found in by_case(group).items() for line in lines(case, found)],
            caption,
            software(group[0]),
        )
        for group in grouped(rows, key).values()
    ]


def both_times(found: dict[str, Row]) -> list[str]:
    """Return the times of stock and of tensors as two cells."""
    return [time_with_spread(found.get(way)) for way in (STOCK, TENSORS)]


def gains_by_n(rows: list[Row]) -> list[tuple[int, float]]:
    """Return n and the ratio of stock's time to that on tensors, sorted by n, where both ways were run."""
    ratios = [(case.n, ratio(found.get(STOCK), found.get(TENSORS))) for case, found in by_case(rows).items()]
    return sorted((n, gain) for n, gain in ratios if gain is not None)


def crossovers(gains: list[tuple[int, float]]) -> str:
    """Return between which n a loss turns into a gain or back."""
    turns = [
        f"between n = {before[0]:,} and {after[0]:,}"
        for before, after in pairwise(gains)
        if (before[1] < 1) != (after[1] < 1)
    ]
    return "Crossovers: " + ", ".join(turns) + "." if turns else "There is no crossover among these n."


def dot_pictures(
    rows: list[Row],
    folder: Path,
    title: Callable[[Row], str],
    what: str,
    label: Callable[[Row], str],
    key: Callable[[Row], Hashable] = setting,
    part: Callable[[Row], tuple[str, ...]] = lambda row: (),
) -> list[Path]:
    """Plot times and their ratios to stock's, one picture for each setting.

    :param rows: Rows of one question.
    :param folder: Where to write the pictures.
    :param title: Makes the title of one of a picture's rows.
    :param what: What is timed, for the axis.
    :param label: Names the problem of a row.
    :param key: What the rows of a picture have in common.
    :param part: What tells a picture's file name from those of the question's other pictures.
    """
    return [
        plot.dots(group, STOCK, folder / file_name(group[0], *part(group[0])), title(group[0]), what, label)
        for group in grouped(rows, key).values()
    ]
