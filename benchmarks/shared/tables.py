"""The tables that questions make of their rows, in the terminal and in Markdown; numbers as text; messages."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from itertools import pairwise

from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table as RichTable

from .rows import Found, Row, by_case, by_provider, grouped, setting
from .ways import STOCK, TENSORS

KERNEL_TITLES = {"rbf": "RBF", "matern": "Matern 5/2"}
IN_TURN = "Medians and [20 %, 80 %] quantiles, in turn."

console = Console()
if not console.is_terminal:
    console.width = 120  # in a file nobody resizes the window; rich would assume 80 columns


@dataclass(frozen=True)
class Table:
    """A table of text."""

    title: str  # what it shows, with its conditions
    columns: list[str]  # the heads of its columns
    lines: list[list[str]]  # its lines
    caption: str = ""  # how to read it
    source: str = ""  # with what it was measured


def say(text: str) -> None:
    """Print a line above whatever progress bar is running."""
    console.print(text, markup=False, highlight=False)


def progress() -> Progress:
    """Return the progress bars of a run."""
    return Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), console=console
    )


def _below(caption: str, source: str) -> str:
    return " ".join(part for part in (caption, f"{source}." if source else "") if part)


def print_table(table: Table) -> None:
    """Print `table` in the terminal."""
    rich_table = RichTable(box=box.SIMPLE_HEAD)
    for number, column in enumerate(table.columns):
        rich_table.add_column(column, justify="left" if number == 0 else "right")
    for line in table.lines:
        rich_table.add_row(*(cell.replace(" ", "\N{NO-BREAK SPACE}") for cell in line))  # heads may wrap, cells not
    # Not as the table's own title and caption, which would be as narrow as the table.
    console.print(table.title, style="bold", markup=False, highlight=False)
    console.print(rich_table)
    console.print(_below(table.caption, table.source), style="italic", markup=False, highlight=False)
    console.print()


def markdown_table(table: Table, with_source: bool = True) -> str:
    """Return `table` in Markdown, and below it, if asked, with what it was measured."""
    lines = [table.columns, ["---", *["---:"] * (len(table.columns) - 1)], *table.lines]
    body = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    below = _below(table.caption, table.source if with_source else "")
    return "\n\n".join(part for part in (f"**{table.title}**", body, below) if part)


def milliseconds(seconds: float | None) -> str:
    """Return a time in milliseconds with three digits, or a dash."""
    return "-" if seconds is None else f"{seconds * 1e3:.3g}" if seconds < 0.9995 else f"{seconds * 1e3:,.0f}"


def time_with_spread(row: Row | None) -> str:
    """Return the median time of `row` in milliseconds with its 20 % and 80 % quantiles."""
    if row is None or row.p50 is None:
        return "-"
    return f"{milliseconds(row.p50)} [{milliseconds(row.p20)}, {milliseconds(row.p80)}]"


def ratio(base: Row | None, row: Row | None) -> float | None:
    """Return the median time of `base` over that of `row`; they were run in turn."""
    return None if base is None or row is None or not row.p50 or not base.p50 else base.p50 / row.p50


def mebibytes(row: Row | None) -> str:
    """Return the peak memory of `row` in MiB, or a dash."""
    return "-" if row is None or row.peak_memory is None else f"{row.peak_memory / 2**20:,.1f}"


def times(value: float | None) -> str:
    """Return a ratio as text."""
    return "-" if value is None else f"{value:.2f}"


def percent(share: float) -> str:
    """Return a share as text, which is never -0%."""
    return f"{round(100 * share)}%"


def span(values: list[float], text: Callable[[float], str] = times) -> str:
    """Return the least and the largest of values as text."""
    return f"{text(min(values))} to {text(max(values))}"


def listed(words: list[str]) -> str:
    """Return words as a list in a sentence."""
    return " and ".join(part for part in (", ".join(words[:-1]), words[-1]) if part)


def listed_n(sizes: list[int]) -> str:
    """Return numbers of points as a list in a sentence."""
    return listed([f"{n:,}" for n in sizes])


def conditions(row: Row) -> str:
    """Return in a line on what `row` was measured."""
    device = f"{row.machine['gpu']}, " if "gpu" in row.machine else ""
    threads = row.machine["threads"]
    return f"{device}{row.machine['cpu']}, {threads} thread{'s' if threads > 1 else ''}"


def versions_of(row: Row) -> str:
    """Return the versions that `row` was measured with."""
    return ", ".join(f"{name} {version}" for name, version in row.versions.items())


def software(rows: list[Row]) -> str:
    """Return in a line with what `rows` were measured, which may be of several commits."""
    versions, commits = dict.fromkeys(map(versions_of, rows)), dict.fromkeys(row.commit for row in rows)
    dates = [row.date for row in rows]
    return f"{'; '.join(versions)}; commit {', '.join(commits)}; {' to '.join(dict.fromkeys([min(dates), max(dates)]))}"


def describe(row: Row) -> str:
    """Return what the rows of a table have in common, in a line."""
    return ", ".join([KERNEL_TITLES[row.case.kernel], f"d = {row.case.d}", row.case.dtype, conditions(row)])


Title = Callable[[Row], str]  # of one of a table's, or a picture's, rows
Cell = Callable[[Row, Found], str]  # of a line's row, and of all rows of its case


def titled(title: str, with_mode: bool = False) -> Title:
    """Return what puts the rows' setting, and their mode if asked, behind `title`."""
    return lambda row: f"{title}{', ' + row.mode if with_mode else ''}: {describe(row)}"


def time_of(way: str) -> Cell:
    """Return the cell of a provider's time."""
    return lambda row, found: time_with_spread(found.get(way))


def over(base: str, way: str) -> Cell:
    """Return the cell of one provider's time over another's."""
    return lambda row, found: times(ratio(found.get(base), found.get(way)))


def once(cell: Cell) -> Cell:
    """Return `cell`, left empty in all lines of a case but the first."""
    return lambda row, found: cell(row, found) if row is next(iter(found.values())) else ""


# Columns that many tables have.
N: dict[str, Cell] = {"n": lambda row, found: f"{row.case.n:,}"}
TIMES = {"stock (ms)": time_of(STOCK), "tensors (ms)": time_of(TENSORS)}
TIMES_AND_RATIO = {**TIMES, "ratio": over(STOCK, TENSORS)}
WAY: dict[str, Cell] = {"way": lambda row, found: row.provider}
MEMORY: dict[str, Cell] = {
    f"{way} (MiB)": lambda row, found, way=way: mebibytes(found.get(way)) for way in (STOCK, TENSORS)
}


def case_tables(
    rows: list[Row],
    title: Title,
    columns: dict[str, Cell],
    caption: str,
    key: Callable[[Row], Hashable] = setting,
    ways: tuple[str, ...] = (),
) -> list[Table]:
    """Return one table for each setting, with a line for each case, or more.

    :param rows: Rows of one question.
    :param columns: The cells' makers by the heads of the columns.
    :param caption: How to read it.
    :param key: What the rows of a table have in common.
    :param ways: Providers whose rows have a line each (Default: a case has one).
    """
    made = []
    for group in grouped(rows, key).values():
        lines = [
            [cell(row, found) for cell in columns.values()]
            for found in by_case(group).values()
            for row in ([row for way, row in found.items() if way in ways] if ways else list(found.values())[:1])
        ]
        made.append(Table(title(group[0]), list(columns), lines, caption, software(group)))
    return made


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
    :param with_time: Providers whose times are printed, too.
    :param base: The provider that the others are compared with.
    :param inverse: Print the others' times over the base's instead of the base's over the others'.
    :param floor: A provider that does the least that has to be done; the times of `with_time` over its are printed.
    """
    made = []
    for group in grouped(sorted(rows, key=lambda row: row.case.n), setting).values():
        named = [name for name in by_provider(group) if name != floor]
        timed = [name for name in with_time if name in named]
        pairs = [(name, base) if inverse else (base, name) for name in named if name != base]
        pairs += [(name, floor) for name in timed if floor]
        columns = N | {f"{name} (ms)": time_of(name) for name in timed}
        columns |= {f"{first} / {second}": over(first, second) for first, second in pairs}
        made += case_tables(group, titled(title), columns, f"{caption} {IN_TURN}")
    return made


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
