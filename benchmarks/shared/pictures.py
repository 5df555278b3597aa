"""The pictures that questions draw of their rows, and the names of the files."""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, NullFormatter, PercentFormatter

from .rows import Found, Row, by_case, by_provider, grouped, setting
from .tables import Title, conditions
from .ways import STOCK, WAYS

# Okabe and Ito's colours, told apart by colour-blind readers; the marker says it once more.
COLOURS = ["#000000", "#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"]
MARKERS = ["o", "s", "D", "^", "v", "P", "X"]

STYLE = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "0.9",
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "savefig.dpi": 200,
    "savefig.bbox": "tight",
}


def plain_numbers(axis: matplotlib.axis.Axis) -> None:
    """Label a logarithmic axis with 0.1, 1, 10 instead of powers."""
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    axis.set_minor_formatter(NullFormatter())


def _ticks_at(axes: Axes, places: set[float]) -> None:
    """Put a tick at every place where something was measured, but where two would overlap."""
    kept: list[float] = []
    for place in sorted(places, reverse=True):
        if not kept or kept[-1] / place > 1.45:
            kept.append(place)
    axes.set_xticks(kept, [f"{place:,g}" for place in kept])
    axes.set_xticks([], minor=True)


def _looks(names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Return colour and marker by name; the ways to run GPyTorch look the same in every picture."""
    others = [name for name in dict.fromkeys(names) if name not in WAYS]
    looks = {
        name: {"color": COLOURS[number % len(COLOURS)], "marker": MARKERS[number % len(MARKERS)], "markersize": 5}
        for number, name in enumerate([*WAYS, *others])
    }
    looks[STOCK] |= {"markersize": 8, "markerfacecolor": "none"}  # a ring around whatever lies on top of it
    return looks


@contextmanager
def _drawn(path: Path, title: str, *panels: int, **options: Any) -> Iterator[tuple]:
    """Yield a figure and its axes, and write the figure to the PNG at `path`, under a title with the conditions."""
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(*panels, layout="constrained", **options)
        yield figure, axes
        figure.suptitle(title, fontsize=10)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path)
        plt.close(figure)


def file_name(row: Row, *parts: str) -> str:
    """Return the name of a picture of rows like `row`; `parts` tell it from the question's others."""
    words = [row.case.question, row.case.device.replace(":", ""), row.case.kernel, row.case.dtype, *parts]
    return re.sub(r"\W+", "-", " ".join([*words, conditions(row)])) + ".png"


def time_pictures(
    rows: list[Row],
    folder: Path,
    title: Title,
    what: str,
    base: str = STOCK,
    floor: str | None = None,
    key: Callable[[Row], Hashable] = setting,
    part: Callable[[Row], tuple[str, ...]] = lambda row: (),
) -> list[Path]:
    """Plot time against n (with the 20 % to 80 % band) beside its ratio to the base's, one picture for each setting.

    :param floor: A provider that does only a part of the work: it has a time and no ratio.
    :param what: What is timed, for the axis.
    :param key: What the rows of a picture have in common.
    :param part: What tells a picture's file name from those of the question's other pictures.
    """
    paths = []
    for group in grouped(rows, key).values():
        paths.append(folder / file_name(group[0], *part(group[0])))
        timed = sorted((row for row in group if row.p50), key=lambda row: row.case.n)
        base_time = {row.case: row.p50 for row in timed if row.provider == base}
        looks = _looks(row.provider for row in timed)
        with _drawn(paths[-1], title(group[0]), 1, 2, figsize=(9.5, 3.8)) as (_, (left, right)):
            for name, lines in by_provider(timed).items():
                sizes = [row.case.n for row in lines]
                p20, p50, p80 = ([getattr(row, p) * 1e3 for row in lines] for p in ("p20", "p50", "p80"))
                left.plot(sizes, p50, label=name, linewidth=1.5, **looks[name])
                left.fill_between(sizes, p20, p80, color=looks[name]["color"], alpha=0.15, linewidth=0)
                paired = [row for row in lines if row.case in base_time and name not in (base, floor)]
                if paired:
                    ratios = [base_time[row.case] / row.p50 for row in paired]
                    right.plot([row.case.n for row in paired], ratios, label=name, linewidth=1.5, **looks[name])
            for axes in (left, right):
                axes.set_xscale("log")
                axes.set_xlabel("Number of training points n")
                _ticks_at(axes, {row.case.n for row in timed})
            left.set_yscale("log")
            plain_numbers(left.yaxis)
            left.set_ylabel(f"{what} (ms)")
            left.legend()
            right.axhline(1, color="0.4", linewidth=1, linestyle="--")
            right.set_ylabel(f"Time of {base} / time")
            right.set_ylim(bottom=0)
    return paths


def curve_pictures(
    rows: list[Row],
    folder: Path,
    title: Title,
    panels: Callable[[list[Row]], dict[str, dict[str, tuple[list[float], list[float]]]]],
    x_label: str = "Number of training points n",
    y_log: bool = True,
    x_falls: bool = False,
    key: Callable[[Row], Hashable] = setting,
    part: Callable[[Row], tuple[str, ...]] = lambda row: (),
) -> list[Path]:
    """Plot panels of curves over a logarithmic axis, one picture for each setting.

    :param panels: By the label of its ordinate (with the unit), each panel's curves: their points, by their names.
    :param y_log: Whether the ordinates are logarithmic, too; otherwise they start at 0.
    :param x_falls: Whether the abscissa falls to the right.
    """
    paths = []
    for group in grouped(rows, key).values():
        paths.append(folder / file_name(group[0], *part(group[0])))
        made = panels(group)
        size = (1.5 + 3.6 * len(made), 3.8)
        with _drawn(paths[-1], title(group[0]), 1, len(made), figsize=size, squeeze=False) as (_, all_axes):
            for axes, (y_label, series) in zip(all_axes[0], made.items(), strict=True):
                looks = _looks(series)
                for name, (xs, ys) in series.items():
                    axes.plot(xs, ys, label=name, linewidth=1.5, **looks[name])
                axes.set_xscale("log")
                axes.set_xlabel(x_label)
                axes.set_ylabel(y_label)
                _ticks_at(axes, {x for xs, _ in series.values() for x in xs})
                if x_falls:
                    axes.invert_xaxis()
                if y_log:
                    axes.set_yscale("log")
                else:
                    axes.set_ylim(bottom=0)
            all_axes[0][0].legend()
    return paths


def dot_pictures(
    rows: list[Row],
    folder: Path,
    title: Title,
    what: str,
    label: Callable[[Row], str],
    key: Callable[[Row], Hashable] = setting,
    part: Callable[[Row], tuple[str, ...]] = lambda row: (),
) -> list[Path]:
    """Plot times and their ratios to stock's, a line of dots a problem: one picture for each setting.

    :param label: Names the problem of a row; the others are those of :func:`time_pictures`.
    """
    paths = []
    for group in grouped(rows, key).values():
        paths.append(folder / file_name(group[0], *part(group[0])))
        names = {row.case: label(row) for row in sorted(group, key=lambda row: row.case.n, reverse=True)}
        height = {case: place for place, case in enumerate(names)}
        base_time = {row.case: row.p50 for row in group if row.provider == STOCK}
        looks = _looks(row.provider for row in group)
        size = (9.5, 1.7 + 0.32 * len(names))
        with _drawn(paths[-1], title(group[0]), 1, 2, figsize=size, sharey=True) as (figure, (left, right)):
            for name, lines in by_provider(group).items():
                places = [height[row.case] for row in lines]
                low, p50, high = ([getattr(row, p) * 1e3 for row in lines] for p in ("p20", "p50", "p80"))
                left.hlines(places, low, high, color=looks[name]["color"])
                left.plot(p50, places, linestyle="", label=name, **looks[name])
                paired = [row for row in lines if name != STOCK and row.case in base_time]
                if paired:
                    places = [height[row.case] for row in paired]
                    right.plot([base_time[row.case] / row.p50 for row in paired], places, linestyle="", **looks[name])
            left.set_yticks(range(len(names)), list(names.values()))
            left.set_ylim(-0.6, len(names) - 0.4)
            left.set_xscale("log")
            plain_numbers(left.xaxis)
            left.set_xlabel(f"{what} (ms)")
            right.axvline(1, color="0.4", linewidth=1, linestyle="--")
            right.set_xlim(left=0)
            right.set_xlabel(f"Time of {STOCK} / time")
            figure.legend(loc="outside lower center", ncols=4)
    return paths


def share_pictures(
    rows: list[Row], folder: Path, title: Title, what: str, shares: Callable[[Found], dict[str, float]]
) -> list[Path]:
    """Plot shares, by the names of the parts, as bars side by side for each n: one picture for each setting."""
    paths = []
    for group in grouped(rows, setting).values():
        paths.append(folder / file_name(group[0]))
        found = {f"{case.n:,}": shares(found) for case, found in by_case(group).items()}
        parts = list(next(iter(found.values())))
        width = 0.8 / len(parts)
        with _drawn(paths[-1], title(group[0]), figsize=(6.5, 4.3)) as (figure, axes):
            for number, part in enumerate(parts):
                places = [place + (number - (len(parts) - 1) / 2) * width for place in range(len(found))]
                axes.bar(places, [each[part] for each in found.values()], width, label=part, color=COLOURS[number])
            axes.axhline(0, color="0.4", linewidth=1)
            axes.set_xticks(range(len(found)), list(found))
            axes.yaxis.set_major_formatter(PercentFormatter(1))
            axes.set_xlabel("Number of training points n")
            axes.set_ylabel(what)
            axes.grid(axis="x", visible=False)
            figure.legend(loc="outside lower center", ncols=2)
    return paths
