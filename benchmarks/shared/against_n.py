"""Tables and pictures of time against n, for questions whose providers do the same work at several n."""

from __future__ import annotations

import re
from pathlib import Path

from . import plot
from .models import KERNEL_TITLES
from .row import Row
from .rows import by_case, grouped, providers, setting
from .show import Table, conditions, ratio, software, time_with_spread, times
from .ways import STOCK


def describe(row: Row) -> str:
    """Return what the rows of a table have in common, in a line."""
    parts = [KERNEL_TITLES[row.case.kernel], f"d = {row.case.d}", row.case.dtype, conditions(row)]
    return ", ".join(parts)


def file_name(row: Row, *parts: str) -> str:
    """Return the name of a picture of rows like `row`.

    :param row: One of them.
    :param parts: What else tells it from other pictures.
    """
    words = [row.case.question, row.case.device.replace(":", ""), row.case.kernel, row.case.dtype, *parts]
    return re.sub(r"\W+", "-", " ".join([*words, conditions(row)])) + ".png"


def ratio_tables(
    rows: list[Row],
    title: str,
    caption: str,
    with_time: tuple[str, ...],
    base: str = STOCK,
    inverse: bool = False,
    floor: str | None = None,
) -> list[Table]:
    """Return one table for each setting: times of some providers, ratios of all to one of them, a line for each n.

    :param rows: Rows of one mode.
    :param title: The title's beginning.
    :param caption: The caption's beginning.
    :param with_time: Providers whose times are printed, too.
    :param base: The provider that the others are compared with.
    :param inverse: Print the others' times over the base's instead of the base's over the others'.
    :param floor: A provider that does the least that has to be done; the times of `with_time` over its are printed.
    """
    made = []
    for group in grouped(rows, setting).values():
        named = [name for name in providers(group) if name != floor]
        timed = [name for name in with_time if name in named]
        pairs = [(name, base) if inverse else (base, name) for name in named if name != base]
        pairs += [(name, floor) for name in timed if floor]
        lines = []
        for case, found in by_case(sorted(group, key=lambda row: row.case.n)).items():
            ratios = [times(ratio(found.get(over), found.get(under))) for over, under in pairs]
            lines.append([f"{case.n:,}", *(time_with_spread(found.get(name)) for name in timed), *ratios])
        columns = ["n", *(f"{name} (ms)" for name in timed), *(f"{over} / {under}" for over, under in pairs)]
        text = f"{caption} Medians and [20 %, 80 %] quantiles, in turn."
        made.append(Table(f"{title}: {describe(group[0])}", columns, lines, text, software(group[0])))
    return made


def time_pictures(
    rows: list[Row], folder: Path, title: str, what: str, floor: str | None = None, base: str = STOCK
) -> list[Path]:
    """Plot time and its ratio to the base's against n, one picture for each setting; of `floor` the time alone."""
    return [
        plot.time_and_ratio(group, base, folder / file_name(group[0]), f"{title}: {describe(group[0])}", what, floor)
        for group in grouped(rows, setting).values()
    ]
