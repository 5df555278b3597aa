"""One page for the user's machine: what the flag gains for which n, where crossovers lie, whether to switch it on."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from itertools import pairwise

from .models import KERNEL_TITLES
from .options import Options
from .row import Row
from .rows import by_provider, grouped, setting
from .run import answer
from .show import conditions, markdown_table, milliseconds, ratio, say, software
from .ways import STOCK, TENSORS

SECTIONS = {
    "train": "Training",
    "attribution": "Where the gain comes from",
    "memory": "Memory",
    "predict": "Prediction",
    "batch": "Batches of models",
    "bo": "BoTorch",
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


def _crossovers(gains: list[tuple[int, float]]) -> str:
    """Return between which n the flag turns from a loss into a gain or back."""
    turns = [
        f"between n = {before[0]:,} and {after[0]:,}"
        for before, after in pairwise(gains)
        if (before[1] < 1) != (after[1] < 1)
    ]
    return "Crossovers: " + ", ".join(turns) + "." if turns else "There is no crossover among these n."


def verdicts(rows: list[Row]) -> list[str]:
    """Return for each kernel and data type of the training rows whether to switch the flag on.

    :param rows: Rows of the question `train`.
    """
    said = []
    for group in grouped(rows, setting).values():
        gains, saved = [], 0.0
        for case, together in grouped(sorted(group, key=lambda row: row.case.n), lambda row: row.case).items():
            found = by_provider(together)
            gains.append((case.n, ratio(found[STOCK], found[TENSORS])))
            saved = max(saved, found[STOCK].p50 - found[TENSORS].p50)
        worst, best = min(gain for _, gain in gains), max(gain for _, gain in gains)
        if worst >= 1 - MARGIN:
            advice = "Switch it on" if best > 1 + MARGIN else "It makes no difference here"
        else:
            advice = "Switch it on only where it is faster" if best > 1 + MARGIN else "Leave it off"
        first = group[0].case
        said.append(
            f"- **{KERNEL_TITLES[first.kernel]}, {first.dtype}: {advice}.** With the flag on, a training step is "
            f"{'; '.join(_spans(gains))}. {_crossovers(gains)} The most that a step saved was {milliseconds(saved)} ms."
        )
    return said


def write(options: Options) -> None:
    """Measure what is not on record yet, and write the page and its pictures into the output folder.

    :param options: What the run was asked for; `quick` shortens every section.
    """
    parts, first = [], None
    for name, title in SECTIONS.items():
        if name == "bo" and find_spec("botorch") is None:
            parts.append(f"## {title}\n\nLeft out: BoTorch is not installed.")
            continue
        module = import_module(f".{name}", __package__)
        rows = answer(module, options)
        if not rows:
            parts.append(f"## {title}\n\nLeft out: not enough memory.")
            continue
        first = first or rows[0]
        lead = ["\n".join(verdicts(rows))] if name == "train" else []
        remarks = module.remarks(rows) if hasattr(module, "remarks") else []
        tables = [markdown_table(table) for table in module.tables(rows)]
        pictures = [f"![]({path.name})" for path in module.pictures(rows, options.output)]
        parts.append("\n\n".join([f"## {title}", *lead, *remarks, *pictures, *tables]))
    head = "# gpytorch.settings.use_torch_tensors on this machine"
    measured_on = f"{conditions(first)}\n\n{software(first)}" if first else ""
    page = options.output / "report.md"
    page.write_text("\n\n".join([head, measured_on, *parts]) + "\n")
    say(f"Written: {page}")
