"""Plots of time, and of its ratio to stock, against n."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter, PercentFormatter

from .row import Row
from .rows import grouped
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


def _line(axes: Axes, look: dict[str, Any], xs: list[float], values: list[float], label: str) -> None:
    axes.plot(xs, values, label=label, linewidth=1.5, **look)


def _save(figure: Figure, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    plt.close(figure)
    return path


def time_and_ratio(rows: list[Row], base: str, path: Path, title: str, what: str, floor: str | None = None) -> Path:
    """Plot time against n (with the 20 % to 80 % band) beside the ratio of the base's time to each other provider's.

    :param rows: Rows of one setting: a provider and an n each.
    :param base: The provider the ratios refer to.
    :param path: The PNG to write.
    :param title: Title of the figure, with the conditions.
    :param what: What is timed, for the axis.
    :param floor: A provider that does only a part of the work: it has a time and no ratio.
    :return: `path`.
    """
    timed = sorted((row for row in rows if row.p50), key=lambda row: row.case.n)
    base_time = {row.case: row.p50 for row in timed if row.provider == base}
    with plt.rc_context(STYLE):
        figure, (left, right) = plt.subplots(1, 2, figsize=(9.5, 3.8), layout="constrained")
        looks = _looks(row.provider for row in timed)
        for name, group in grouped(timed, lambda row: row.provider).items():
            sizes = [row.case.n for row in group]
            p20, p50, p80 = ([getattr(row, p) * 1e3 for row in group] for p in ("p20", "p50", "p80"))
            _line(left, looks[name], sizes, p50, name)
            left.fill_between(sizes, p20, p80, color=looks[name]["color"], alpha=0.15, linewidth=0)
            paired = [row for row in group if row.case in base_time and name not in (base, floor)]
            if paired:
                ratios = [base_time[row.case] / row.p50 for row in paired]
                _line(right, looks[name], [row.case.n for row in paired], ratios, name)
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
        figure.suptitle(title, fontsize=10)
        return _save(figure, path)


def curves(
    panels: dict[str, dict[str, tuple[list[float], list[float]]]],
    path: Path,
    title: str,
    x_label: str,
    y_log: bool,
    x_falls: bool = False,
) -> Path:
    """Plot panels of curves over a logarithmic axis.

    :param panels: By the label of its ordinate (with the unit), each panel's curves: their points, by their names.
    :param path: The PNG to write.
    :param title: Title of the figure, with the conditions.
    :param x_label: What is on the abscissa, with its unit.
    :param y_log: Whether the ordinates are logarithmic, too; otherwise they start at 0.
    :param x_falls: Whether the abscissa falls to the right.
    :return: `path`.
    """
    with plt.rc_context(STYLE):
        width = 1.5 + 3.6 * len(panels)
        figure, all_axes = plt.subplots(1, len(panels), figsize=(width, 3.8), layout="constrained", squeeze=False)
        for axes, (y_label, series) in zip(all_axes[0], panels.items(), strict=True):
            looks = _looks(series)
            for name, (xs, ys) in series.items():
                _line(axes, looks[name], xs, ys, name)
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
        figure.suptitle(title, fontsize=10)
        return _save(figure, path)


def dots(rows: list[Row], base: str, path: Path, title: str, what: str, label: Callable[[Row], str]) -> Path:
    """Plot time, and its ratio to the base's, of problems that have no common axis: one line of dots a problem.

    :param rows: Rows of one setting.
    :param base: The provider the ratios refer to.
    :param path: The PNG to write.
    :param title: Title of the figure, with the conditions.
    :param what: What is timed, for the axis.
    :param label: Names the problem of a row.
    :return: `path`.
    """
    names = {row.case: label(row) for row in sorted(rows, key=lambda row: row.case.n, reverse=True)}
    height = {case: place for place, case in enumerate(names)}
    base_time = {row.case: row.p50 for row in rows if row.provider == base}
    with plt.rc_context(STYLE):
        figure, (left, right) = plt.subplots(
            1, 2, figsize=(9.5, 1.7 + 0.32 * len(names)), layout="constrained", sharey=True
        )
        looks = _looks(row.provider for row in rows)
        for name, group in grouped(rows, lambda row: row.provider).items():
            places = [height[row.case] for row in group]
            left.hlines(
                places,
                [row.p20 * 1e3 for row in group],
                [row.p80 * 1e3 for row in group],
                color=looks[name]["color"],
            )
            left.plot([row.p50 * 1e3 for row in group], places, linestyle="", label=name, **looks[name])
            paired = [row for row in group if name != base and row.case in base_time]
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
        right.set_xlabel(f"Time of {base} / time")
        figure.legend(loc="outside lower center", ncols=4)
        figure.suptitle(title, fontsize=10)
        return _save(figure, path)


def shares(
    labels: list[str], series: dict[str, list[float]], path: Path, title: str, x_label: str, y_label: str
) -> Path:
    """Plot shares as bars side by side.

    :param labels: Names the groups of bars.
    :param series: The share in each group, by the name of the part.
    :param path: The PNG to write.
    :param title: Title of the figure, with the conditions.
    :param x_label: What the groups are.
    :param y_label: What the shares are of.
    :return: `path`.
    """
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(6.5, 4.3), layout="constrained")
        width = 0.8 / len(series)
        for number, (name, values) in enumerate(series.items()):
            places = [place + (number - (len(series) - 1) / 2) * width for place in range(len(labels))]
            axes.bar(places, values, width, label=name, color=COLOURS[number % len(COLOURS)])
        axes.axhline(0, color="0.4", linewidth=1)
        axes.set_xticks(range(len(labels)), labels)
        axes.yaxis.set_major_formatter(PercentFormatter(1))
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        axes.grid(axis="x", visible=False)
        figure.legend(loc="outside lower center", ncols=2)
        figure.suptitle(title, fontsize=10)
        return _save(figure, path)
