"""The README's tables and pictures, made from the recorded results.

Between ``<!-- results:train dtype=float64 kernel=rbf -->`` and ``<!-- /results -->`` stand the tables that
``benchmarks/results/train.json`` makes, of the rows whose case or machine has these values; with the word ``pictures``
in the marker, the pictures instead. ``device=cuda`` and the like pick the machine, ``mode=later_call`` the row's mode.

Between ``<!-- stacks -->`` and ``<!-- /stacks -->`` stand the releases that the suites ran on.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from tempfile import TemporaryDirectory

from .shared.machine import ROOT
from .shared.options import InputError
from .shared.rows import Case, Row, read
from .shared.run import pictures_of, question_called, remarks_of
from .shared.tables import Table, markdown_table, say

README = ROOT / "README.md"
RESULTS = Path(__file__).resolve().parent / "results"
MARKED = re.compile(r"(<!-- results:(\w+)((?: [\w=]+)*) -->\n).*?(<!-- /results -->)", re.DOTALL)
STACKS = re.compile(r"(<!-- stacks -->\n).*?(<!-- /stacks -->)", re.DOTALL)
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

    def fill_stacks(match: re.Match) -> str:
        return f"{match[1]}\n{markdown_table(_stacks(results / 'stacks.json'))}\n\n{match[2]}"

    return STACKS.sub(fill_stacks, MARKED.sub(fill, text))


def _content(question: str, words: list[str], drawings: Path, results: Path, root: Path) -> str:
    try:
        module = question_called(question)
    except ModuleNotFoundError:
        raise InputError(f"README.md asks for results of {question!r}, and there is no such question.") from None
    conditions = dict(word.split("=") for word in words if "=" in word)
    unknown = [name for name in conditions if name != "mode" and name not in Case.__dataclass_fields__]
    if unknown:
        raise InputError(f"README.md picks results of {question} by {unknown[0]!r}, and a case has no such field.")
    rows = [row for row in read(results / f"{question}.json") if _meets(row, conditions)]
    if not rows:
        raise InputError(f"README.md asks for {question} {' '.join(words)}, and no such results are recorded.")
    if "pictures" in words:
        folder = results.relative_to(root)
        return "\n\n".join(f"![]({(folder / path.name).as_posix()})" for path in pictures_of(module, rows, drawings))
    return "\n\n".join([*map(markdown_table, module.tables(rows)), *remarks_of(module, rows)])


def _meets(row: Row, conditions: dict[str, str]) -> bool:
    named = {"mode": row.mode, **vars(row.case)}
    return all(str(named[name]).replace(" ", "_") == value for name, value in conditions.items())


def _stacks(path: Path) -> Table:
    """Return the table of the releases that were tried, of the file that `python test/stacks` wrote."""
    if not path.exists():
        raise InputError("README.md asks for the releases that were tried, and none are on record.")

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
    """Write the recorded results into README.md, or, with `check`, only say whether they stand there already.

    :return: The exit status: 1 if `check` found the README out of date.
    """
    if not README.exists():
        raise InputError(f"There is no {README.name} to write results into.")
    text = README.read_text()
    if not MARKED.search(text):
        say("README.md has no markers (<!-- results:QUESTION --> ... <!-- /results -->): nothing to do.")
        return 0
    if check:
        with TemporaryDirectory() as folder:
            new = rendered(text, Path(folder))
        say("README.md and the results agree." if new == text else "README.md differs from the recorded results.")
        return int(new != text)
    README.write_text(rendered(text, RESULTS))
    say("README.md is up to date.")
    return 0
