"""The README's tables and pictures, made from the recorded results.

Between ``<!-- results:train dtype=float64 kernel=rbf -->`` and ``<!-- /results -->`` stand the tables that
``benchmarks/results/train.json`` makes, of the rows whose case or machine has these values; with the word ``pictures``
in the marker, the pictures instead. ``device=cuda`` and the like pick the machine, ``mode=later_call`` the row's mode.

Between ``<!-- stacks -->`` and ``<!-- /stacks -->`` stand the releases that the suites ran on.
"""

from __future__ import annotations

import re
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory

from . import stacks
from .shared import record
from .shared.machine import ROOT
from .shared.options import InputError
from .shared.row import Case, Row
from .shared.show import markdown_table, say

README = ROOT / "README.md"
RESULTS = Path(__file__).resolve().parent / "results"
MARKED = re.compile(r"(<!-- results:(\w+)((?: [\w=]+)*) -->\n).*?(<!-- /results -->)", re.DOTALL)

STACKS = re.compile(r"(<!-- stacks -->\n).*?(<!-- /stacks -->)", re.DOTALL)


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
        return f"{match[1]}\n{markdown_table(stacks.table(stacks.read(results / 'stacks.json')))}\n\n{match[2]}"

    return STACKS.sub(fill_stacks, MARKED.sub(fill, text))


def _content(question: str, words: list[str], drawings: Path, results: Path, root: Path) -> str:
    try:
        module = import_module(f".questions.{question}", __package__)
    except ModuleNotFoundError:
        raise InputError(f"README.md asks for results of {question!r}, and there is no such question.") from None
    conditions = dict(word.split("=") for word in words if "=" in word)
    unknown = [name for name in conditions if name != "mode" and name not in Case.__dataclass_fields__]
    if unknown:
        raise InputError(f"README.md picks results of {question} by {unknown[0]!r}, and a case has no such field.")
    rows = [row for row in record.read(results / f"{question}.json") if _meets(row, conditions)]
    if not rows:
        raise InputError(f"README.md asks for {question} {' '.join(words)}, and no such results are recorded.")
    if "pictures" in words:
        folder = results.relative_to(root)
        return "\n\n".join(f"![]({(folder / path.name).as_posix()})" for path in module.pictures(rows, drawings))
    remarks = module.remarks(rows) if hasattr(module, "remarks") else []
    return "\n\n".join([*(markdown_table(table) for table in module.tables(rows)), *remarks])


def _meets(row: Row, conditions: dict[str, str]) -> bool:
    named = {"mode": row.mode, **vars(row.case)}
    return all(str(named[name]).replace(" ", "_") == value for name, value in conditions.items())


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
