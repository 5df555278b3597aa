"""Tables, in the terminal and in Markdown, and messages."""

from __future__ import annotations

from dataclasses import dataclass

from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table as RichTable

from .row import Row

console = Console()
if not console.is_terminal:
    console.width = 120  # in a file nobody resizes the window; rich would assume 80 columns


@dataclass(frozen=True)
class Table:
    """A table of text.

    :param title: What it shows, with its conditions.
    :param columns: The heads of its columns.
    :param lines: Its lines.
    :param caption: How to read it.
    :param source: With what it was measured.
    """

    title: str
    columns: list[str]
    lines: list[list[str]]
    caption: str = ""
    source: str = ""


def say(text: str) -> None:
    """Print a line above whatever progress bar is running."""
    console.print(text, markup=False, highlight=False)


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
    """Return `table` in Markdown.

    :param with_source: Whether to say below it with what it was measured.
    """
    lines = [table.columns, ["---", *["---:"] * (len(table.columns) - 1)], *table.lines]
    body = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    below = _below(table.caption, table.source if with_source else "")
    return "\n\n".join(part for part in (f"**{table.title}**", body, below) if part)


def progress() -> Progress:
    """Return the progress bars of a run."""
    return Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), console=console
    )


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


def listed(words: list[str], last: str = "and") -> str:
    """Return words as a list in a sentence."""
    return f" {last} ".join(part for part in (", ".join(words[:-1]), words[-1]) if part)


def conditions(row: Row) -> str:
    """Return in a line on what `row` was measured."""
    device = f"{row.machine['gpu']}, " if "gpu" in row.machine else ""
    threads = row.machine["threads"]
    return f"{device}{row.machine['cpu']}, {threads} thread{'s' if threads > 1 else ''}"


def software(row: Row) -> str:
    """Return in a line with what `row` was measured."""
    names = ", ".join(f"{name} {version}" for name, version in row.versions.items())
    return f"{names}; commit {row.commit}; {row.date}"
