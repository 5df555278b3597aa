"""One page for the user's machine: what the flag gains for which n, where crossovers lie, whether to switch it on."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

from .questions.memory import STEP
from .shared import pools
from .shared.options import Options
from .shared.rows import Row, by_case, grouped, setting, setting_and_mode
from .shared.run import answer, pictures_of, question_called, remarks_of
from .shared.tables import (
    KERNEL_TITLES,
    conditions,
    crossovers,
    gains_by_n,
    listed,
    markdown_table,
    milliseconds,
    say,
)
from .shared.ways import STOCK, TENSORS

BEYOND = "Beyond max_cholesky_size"
SECTIONS = {
    "train": "Training",
    "attribution": "Where the gain comes from",
    "memory": "Memory",
    "predict": "Prediction",
    "fantasies": "Fantasies",
    "batch": "Batches of models",
    "bo": "BoTorch",
    "threshold": BEYOND,
    "uci": "Training on real data",
}
MARGIN = 0.05  # gains and losses of less are within what a run repeats to


def _spans(gains: list[tuple[int, float]]) -> list[str]:
    """Return in words for which n the flag is faster, about as fast, or slower; `gains` are sorted by n."""

    def verdict(gain: float) -> str:
        return "faster" if gain > 1 + MARGIN else "slower" if gain < 1 - MARGIN else "about as fast"

    spans: list[tuple[str, list[tuple[int, float]]]] = []
    for n, gain in gains:
        if not spans or spans[-1][0] != verdict(gain):
            spans.append((verdict(gain), []))
        spans[-1][1].append((n, gain))
    words = []
    for what, span in spans:
        sizes = f"n = {span[0][0]:,}" + (f" to {span[-1][0]:,}" if len(span) > 1 else "")
        low, high = min(gain for _, gain in span), max(gain for _, gain in span)
        factor = f"{low:.2f}" if len(span) == 1 else f"{low:.2f} to {high:.2f}"
        words.append(f"{what} at {sizes} ({factor} times as fast)")
    return words


def _advice(gains: list[tuple[int, float]]) -> str:
    worst, best = min(gain for _, gain in gains), max(gain for _, gain in gains)
    if worst >= 1 - MARGIN:
        return "Switch it on" if best > 1 + MARGIN else "It makes no difference here"
    return "Switch it on only where it is faster" if best > 1 + MARGIN else "Leave it off"


def verdicts(rows: list[Row]) -> list[str]:
    """Return for each kernel and data type of the training rows whether to switch the flag on.

    :param rows: Rows of the question `train`.
    """
    said = []
    for group in grouped(rows, setting).values():
        gains = gains_by_n(group)
        if not gains:
            continue
        both = [found for found in by_case(group).values() if STOCK in found and TENSORS in found]
        saved = max(found[STOCK].p50 - found[TENSORS].p50 for found in both)
        alone = sorted(case.n for case, found in by_case(group).items() if TENSORS in found and STOCK not in found)
        first = group[0].case
        said.append(
            f"- **{KERNEL_TITLES[first.kernel]}, {first.dtype}: {_advice(gains)}.** With the flag on, a training step "
            f"is {'; '.join(_spans(gains))}. {crossovers(gains)} The most that a step saved was {milliseconds(saved)} "
            "ms." + (f" At n = {listed([f'{n:,}' for n in alone])} only tensors had memory enough." if alone else "")
        )
    return said


def speed(rows: list[Row]) -> list[str]:
    """Return for each mode how much faster it is with the flag on, in a line.

    :param rows: Rows of one question.
    """
    lines = []
    for mode, group in grouped(rows, lambda row: row.mode).items():
        gains = gains_by_n(group)
        if not gains:
            continue
        low, high = min(gain for _, gain in gains), max(gain for _, gain in gains)
        span = f"{low:.2f}" if len(gains) == 1 else f"{low:.2f} to {high:.2f}"
        alone = [case for case, found in by_case(group).items() if STOCK not in found]
        words = [f"n = {case.n:,} with {case.m:,} test points" if case.m else f"n = {case.n:,}" for case in alone]
        without = f"; only with it on was there memory for {listed(words)}" if alone else ""
        lines.append(f"- {mode}: {span} times as fast with the flag on{without}.")
    return lines


def memory_saved(rows: list[Row]) -> list[str]:
    """Return what the flag saves of a training step's memory, a line for each kernel and data type.

    :param rows: Rows of the question `memory`.
    """
    lines = []
    for group in grouped([row for row in rows if row.mode == STEP], setting).values():
        largest = max(by_case(group).items(), key=lambda item: item[0].n)
        held = [largest[1][way].values["buffers"] for way in (STOCK, TENSORS)]
        lines.append(
            f"- {KERNEL_TITLES[largest[0].kernel]}, {largest[0].dtype}: at n = {largest[0].n:,} a step needs the "
            f"memory of {held[1]:.1f} n x n matrices with the flag on and of {held[0]:.1f} with it off: in the same "
            f"memory {(held[0] / held[1]) ** 0.5:.1f} times as many points train."
        )
    return lines


LEADS = {"train": verdicts, "memory": memory_saved} | dict.fromkeys(
    ("predict", "fantasies", "batch", "bo", "uci"), speed
)


def in_short(answers: dict[str, list[Row]]) -> str:
    """Return whether to switch the flag on, and how, in a paragraph.

    :param answers: The rows of each question.
    """
    timed = [rows for name, rows in answers.items() if name in LEADS and name != "memory"]
    gains = [gain for rows in timed for group in grouped(rows, setting_and_mode).values() for gain in gains_by_n(group)]
    if not gains:
        return "Nothing was timed both ways, so there is nothing to advise."
    low, high = min(gain for _, gain in gains), max(gain for _, gain in gains)
    return (
        f"**{_advice(gains)}.** Of {len(gains)} comparisons below, each of the flag off and on in turn, the least "
        f"favourable is {low:.2f} times as fast with it on, and the most favourable {high:.2f} times. To switch it on: "
        "`GPYTORCH_USE_TORCH_TENSORS=on python your_script.py`, or `with gpytorch.settings.use_torch_tensors():`.\n\n"
        "All was measured with Cholesky at every n. Left to itself GPyTorch goes over from Cholesky to conjugate "
        "gradients beyond `gpytorch.settings.max_cholesky_size`, which is 800, and there the flag changes nothing: "
        f"raise that setting to use it. Up to which n that pays stands under '{BEYOND}'. BoTorch raises "
        "it to 4,096."
    )


def write(options: Options) -> int:
    """Measure what is not on record yet, and write the page and its pictures into the output folder.

    :param options: What the run was asked for; `quick` shortens every section.
    :return: The exit status.
    """
    parts, answers = [], {}
    for name, title in SECTIONS.items():
        if name == "bo" and find_spec("botorch") is None:
            parts.append(f"## {title}\n\nLeft out: BoTorch is not installed.")
            continue
        module = question_called(name)
        rows = answer(module, options)
        if not rows:
            parts.append(f"## {title}\n\nLeft out: not enough memory.")
            continue
        answers[name] = rows
        lead = LEADS[name](rows) if name in LEADS else []
        if name == "bo" and options.device == "cpu":
            lead += pools.remarks(options.seconds)
        parts.append(section(title, lead, module, rows, options.output))
    measured = [row for rows in answers.values() for row in rows]
    head = ["# gpytorch.settings.use_torch_tensors on this machine", *measured_on(measured), in_short(answers)]
    page = options.output / "report.md"
    page.write_text("\n\n".join([*head, *parts]) + "\n")
    say(in_short(answers))
    say(f"Written: {page}")
    return 0


def section(title: str, lead: list[str], module: ModuleType, rows: list[Row], folder: Path | None) -> str:
    """Return a section of a page: a lead, the question's remarks, pictures and tables.

    :param title: Its title.
    :param lead: Lines to begin with.
    :param module: The question's module.
    :param rows: The rows that answer it.
    :param folder: Where the page and its pictures are; None draws no pictures.
    """
    pictures = [f"![]({path.name})" for path in pictures_of(module, rows, folder)] if folder else []
    tables = [markdown_table(table, with_source=False) for table in module.tables(rows)]
    leads = ["\n".join(lead)] if lead else []
    return "\n\n".join([f"## {title}", *leads, *remarks_of(module, rows), *pictures, *tables])


def measured_on(rows: list[Row]) -> list[str]:
    """Return on what and with what `rows` were measured, a paragraph each."""
    machines = list(dict.fromkeys(conditions(row) for row in rows))
    commits = list(dict.fromkeys((*row.versions.items(), row.commit) for row in rows))
    dates = sorted({row.date for row in rows})
    words = [
        f"{', '.join(f'{name} {version}' for name, version in versions)}; commit {commit}"
        for *versions, commit in commits
    ]
    return (
        ["; ".join(machines), f"{'; '.join(words)}; {' to '.join(dict.fromkeys([dates[0], dates[-1]]))}"]
        if rows
        else []
    )
