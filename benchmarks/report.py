"""One page for the user's machine: what the flag gains for which n, where crossovers lie, whether to switch it on."""

from __future__ import annotations

from importlib.util import find_spec
from itertools import groupby
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
    listed_n,
    markdown_table,
    milliseconds,
    say,
    software,
    span,
    times,
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


def _verdict(gain: float) -> str:
    return "faster" if gain > 1 + MARGIN else "slower" if gain < 1 - MARGIN else "about as fast"


def _factors(gains: list[tuple[int, float]]) -> str:
    return span([gain for _, gain in gains]) if len(gains) > 1 else times(gains[0][1])


def _spans(gains: list[tuple[int, float]]) -> str:
    """Return in words for which n the flag is faster, about as fast, or slower; `gains` are sorted by n."""
    words = []
    for verdict, group in groupby(gains, lambda pair: _verdict(pair[1])):
        stretch = list(group)
        sizes = f"n = {stretch[0][0]:,}" + (f" to {stretch[-1][0]:,}" if len(stretch) > 1 else "")
        words.append(f"{verdict} at {sizes} ({_factors(stretch)} times as fast)")
    return "; ".join(words)


def _advice(gains: list[float]) -> str:
    found = {_verdict(gain) for gain in gains}
    if "slower" not in found:
        return "Switch it on" if "faster" in found else "It makes no difference here"
    return "Switch it on only where it is faster" if "faster" in found else "Leave it off"


def verdicts(rows: list[Row]) -> list[str]:
    """Return for each kernel and data type of the rows of `train` whether to switch the flag on."""
    said = []
    for group in grouped(rows, setting).values():
        gains = gains_by_n(group)
        if not gains:
            continue
        cases = by_case(group)
        saved = max(found[STOCK].p50 - found[TENSORS].p50 for found in cases.values() if {STOCK, TENSORS} <= set(found))
        alone = sorted(case.n for case, found in cases.items() if TENSORS in found and STOCK not in found)
        what = f"{KERNEL_TITLES[group[0].case.kernel]}, {group[0].case.dtype}"
        said.append(
            f"- **{what}: {_advice([gain for _, gain in gains])}.** With the flag on, a training step is "
            f"{_spans(gains)}. {crossovers(gains)} The most that a step saved was {milliseconds(saved)} ms."
            + (f" At n = {listed_n(alone)} only tensors had memory enough." if alone else "")
        )
    return said


def speed(rows: list[Row]) -> list[str]:
    """Return for each mode of a question's rows how much faster it is with the flag on, in a line."""
    lines = []
    for mode, group in grouped(rows, lambda row: row.mode).items():
        gains = gains_by_n(group)
        if not gains:
            continue
        alone = [case for case, found in by_case(group).items() if STOCK not in found]
        words = [f"n = {case.n:,}" + (f" with {case.m:,} test points" if case.m else "") for case in alone]
        without = f"; only with it on was there memory for {listed(words)}" if alone else ""
        lines.append(f"- {mode}: {_factors(gains)} times as fast with the flag on{without}.")
    return lines


def memory_saved(rows: list[Row]) -> list[str]:
    """Return what the flag saves of a training step's memory, of rows of `memory`: a line for each setting."""
    lines = []
    for group in grouped([row for row in rows if row.mode == STEP], setting).values():
        case, found = max(by_case(group).items(), key=lambda item: item[0].n)
        stock, tensors = (found[way].values["buffers"] for way in (STOCK, TENSORS))
        lines.append(
            f"- {KERNEL_TITLES[case.kernel]}, {case.dtype}: at n = {case.n:,} a step needs the memory of {tensors:.1f} "
            f"n x n matrices with the flag on and of {stock:.1f} with it off: in the same memory "
            f"{(stock / tensors) ** 0.5:.1f} times as many points train."
        )
    return lines


LEADS = {"train": verdicts, "memory": memory_saved} | dict.fromkeys(
    ("predict", "fantasies", "batch", "bo", "uci"), speed
)


def in_short(answers: dict[str, list[Row]]) -> str:
    """Return whether to switch the flag on, and how, in a paragraph, of the rows of each question."""
    timed = [rows for name, rows in answers.items() if name in LEADS and name != "memory"]
    groups = [group for rows in timed for group in grouped(rows, setting_and_mode).values()]
    gains = [gain for group in groups for _, gain in gains_by_n(group)]
    if not gains:
        return "Nothing was timed both ways, so there is nothing to advise."
    return (
        f"**{_advice(gains)}.** Of {len(gains)} comparisons below, each of the flag off and on in turn, the least "
        f"favourable is {min(gains):.2f} times as fast with it on, and the most favourable {max(gains):.2f} times. To "
        "switch it on: `GPYTORCH_USE_TORCH_TENSORS=on python your_script.py`, or `with "
        "gpytorch.settings.use_torch_tensors():`.\n\n"
        "All was measured with Cholesky at every n. Left to itself GPyTorch goes over from Cholesky to conjugate "
        "gradients beyond `gpytorch.settings.max_cholesky_size`, which is 800, and there the flag changes nothing: "
        f"raise that setting to use it. Up to which n that pays stands under '{BEYOND}'. BoTorch raises "
        "it to 4,096."
    )


def write(options: Options) -> int:
    """Measure what is not on record yet, write the page and its pictures into the output folder, and return 0."""
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
    """Return a section of a page on a question: a lead, its remarks, pictures (if there is a folder) and tables."""
    pictures = [f"![]({path.name})" for path in pictures_of(module, rows, folder)] if folder else []
    tables = [markdown_table(table, with_source=False) for table in module.tables(rows)]
    leads = ["\n".join(lead)] if lead else []
    return "\n\n".join([f"## {title}", *leads, *remarks_of(module, rows), *pictures, *tables])


def measured_on(rows: list[Row]) -> list[str]:
    """Return on what and with what `rows` were measured, a paragraph each."""
    if not rows:
        return []
    machines = dict.fromkeys(conditions(row) for row in rows)
    return ["; ".join(machines), software(rows)]
