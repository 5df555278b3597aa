"""The tables and pictures of README.md and of the pages of the folders, made from the recorded results.

Between ``<!-- results:train dtype=float64 kernel=rbf -->`` and ``<!-- /results -->`` stand the tables that
``benchmarks/results/train.json`` makes, of the rows whose case or machine has these values; with the word ``pictures``
in the marker, the pictures instead. ``device=cuda`` and the like pick the machine, ``mode=later_call`` the row's mode.

Between ``<!-- gains -->`` and ``<!-- /gains -->`` stands what a user gains, and between ``<!-- stacks -->`` and
``<!-- /stacks -->`` the releases that the suites ran on.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from tempfile import TemporaryDirectory

from . import gains
from .shared.machine import ROOT
from .shared.options import InputError
from .shared.rows import Case, Row, read
from .shared.run import pictures_of, question_called, remarks_of
from .shared.tables import Table, markdown_table, say

PAGES = [ROOT / "README.md", ROOT / "benchmarks" / "README.md", ROOT / "gpytorch" / "README.md"]
RESULTS = Path(__file__).resolve().parent / "results"
MARKED = re.compile(r"(<!-- results:(\w+)((?: [\w=]+)*) -->\n).*?(<!-- /results -->)", re.DOTALL)
SUMMARY = re.compile(r"(<!-- (gains|stacks) -->\n).*?(<!-- /\2 -->)", re.DOTALL)
PACKAGES = {
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


def rendered(text: str, drawings: Path, results: Path = RESULTS, root: Path = ROOT) -> str:
    """Return `text` with everything between markers made anew from the files in `results`.

    :param text: A Markdown text.
    :param drawings: Where to draw the pictures; the text refers to them in `results` all the same.
    :param results: The folder of the recorded rows.
    :param root: The folder that the text lies in.
    """

    def fill(match: re.Match) -> str:
        start, question, words, end = match.groups()
        return f"{start}\n{_content(question, words.split(), drawings, results, root)}\n\n{end}"

    def fill_summary(match: re.Match) -> str:
        start, name, end = match.groups()
        summary = gains.text(results) if name == "gains" else markdown_table(_stacks(results / "stacks.json"))
        return f"{start}\n{summary}\n\n{end}"

    return SUMMARY.sub(fill_summary, MARKED.sub(fill, text))


def _content(question: str, words: list[str], drawings: Path, results: Path, root: Path) -> str:
    try:
        module = question_called(question)
    except ModuleNotFoundError:
        raise InputError(f"A page asks for results of {question!r}, and there is no such question.") from None
    conditions = dict(word.split("=") for word in words if "=" in word)
    unknown = [name for name in conditions if name != "mode" and name not in Case.__dataclass_fields__]
    if unknown:
        raise InputError(f"README.md picks results of {question} by {unknown[0]!r}, and a case has no such field.")
    rows = [row for row in read(results / f"{question}.json") if _meets(row, conditions)]
    if not rows:
        raise InputError(f"A page asks for {question} {' '.join(words)}, and no such results are recorded.")
    if "pictures" in words:
        folder = Path(os.path.relpath(results, root))
        return "\n\n".join(f"![]({(folder / path.name).as_posix()})" for path in pictures_of(module, rows, drawings))
    return "\n\n".join([*map(markdown_table, module.tables(rows)), *remarks_of(module, rows)])


def _meets(row: Row, conditions: dict[str, str]) -> bool:
    named = {"mode": row.mode, **vars(row.case)}
    return all(str(named[name]).replace(" ", "_") == value for name, value in conditions.items())


def _stacks(path: Path) -> Table:
    """Return the table of the releases that were tried, of the file that `python test/stacks` wrote."""
    if not path.exists():
        raise InputError("A page asks for the releases that were tried, and none are on record.")

    def outcome(summary: dict, suite: str) -> str:
        counts, failed = summary["counts"][suite], len(summary["failures"][suite])
        stock = counts["failed"] + counts["errors"] - failed
        return f"{counts['passed']:,}, {failed}" + (f" ({stock})" if stock else "")

    lines = [
        [
            *(summary["versions"][name].partition("+")[0] for name in PACKAGES),  # 2.13.0+cpu is 2.13.0
            *(outcome(summary, suite) for suite in SUITES),
            f"{summary['date']}, {summary['commit']}",
        ]
        for summary in json.loads(path.read_text())
    ]
    return Table("Releases tried", [*PACKAGES.values(), *SUITES.values(), "date, commit"], lines, CAPTION)


def update(check: bool) -> int:
    """Write the recorded results into the pages, or, with `check`, only say whether they stand there already.

    :return: The exit status: 1 if `check` found a page out of date.
    """
    status = 0
    for page in PAGES:
        if not page.exists():
            raise InputError(f"There is no {page.name} to write results into.")
        text, name = page.read_text(), page.relative_to(PAGES[0].parent)
        with TemporaryDirectory() as folder:
            new = rendered(text, Path(folder) if check else RESULTS, root=page.parent)
        if check:
            say(f"{name} and the results agree." if new == text else f"{name} differs from the recorded results.")
            status |= new != text
        else:
            page.write_text(new)
            say(f"{name} is up to date.")
    return int(status)
