"""The pictures that questions draw of their rows, and the names of the files."""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.ticker import Formatter, FuncFormatter, NullFormatter

from .rows import Row, by_provider, grouped, setting
from .tables import Title, conditions
from .ways import STOCK, WAYS

# Okabe and Ito's colours, told apart by colour-blind readers; the marker says it once more.
COLOURS = ["#000000", "#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"]
MARKERS = ["o", "s", "D", "^", "v", "P", "X"]

PLAIN = FuncFormatter(lambda value, _: f"{value:,g}")  # 0.1, 1, 10 instead of powers

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


class Curve(NamedTuple):
    """The points of a curve, and the band around it, if it has one."""

    places: list[float]
    values: list[float]
    band: tuple[list[float], list[float]] | None = None


class Panel(NamedTuple):
    """One of the panels of a picture."""

    label: str  # of the axis of the values, with their unit
    curves: dict[str, Curve]  # by name
    is_log: bool = True  # whether that axis is logarithmic; otherwise it begins at 0
    form: Formatter | None = None  # of the numbers on that axis
    reference: float | None = None  # a value to compare with


def _times_and_ratios(
    rows: list[Row], place: Callable[[Row], float], what: str, base: str, floor: str | None = None
) -> tuple[Panel, Panel]:
    """Return a panel of times (with the 20 % to 80 % band), and one of the base's times over them."""
    base_time = {row.case: row.p50 for row in rows if row.provider == base}
    times, ratios = {}, {}
    for name, timed in by_provider(rows).items():
        p20, p50, p80 = ([getattr(row, p) * 1e3 for row in timed] for p in ("p20", "p50", "p80"))
        times[name] = Curve([place(row) for row in timed], p50, (p20, p80))
        paired = [row for row in timed if row.case in base_time and name not in (base, floor)]
        if paired:
            ratios[name] = Curve([place(row) for row in paired], [base_time[row.case] / row.p50 for row in paired])
    over = Panel(f"Time of {base} / time", ratios, is_log=False, reference=1)
    return Panel(f"{what} (ms)", times, form=PLAIN), over


def curve_pictures(
    rows: list[Row],
    folder: Path,
    title: Title,
    panels: Callable[[list[Row]], Sequence[Panel]],
    x_label: str = "Number of training points n",
    x_falls: bool = False,
    key: Callable[[Row], Hashable] = setting,
    part: Callable[[Row], tuple[str, ...]] = lambda row: (),
) -> list[Path]:
    """Plot panels of curves over a logarithmic axis, one picture for each setting.

    :param panels: The panels that rows make.
    :param x_falls: Whether the abscissa falls to the right.
    :param key: What the rows of a picture have in common.
    :param part: What tells a picture's file name from those of the question's other pictures.
    """
    paths = []
    for group in grouped(sorted(rows, key=lambda row: row.case.n), key).values():
        paths.append(folder / file_name(group[0], *part(group[0])))
        made = panels(group)
        looks = _looks(name for panel in made for name in panel.curves)
        size = (1.5 + 4.0 * len(made), 3.8)
        with _drawn(paths[-1], title(group[0]), 1, len(made), figsize=size, squeeze=False) as (_, all_axes):
            for axes, panel in zip(all_axes[0], made, strict=True):
                for name, (xs, ys, band) in panel.curves.items():
                    axes.plot(xs, ys, label=name, linewidth=1.5, **looks[name])
                    if band is not None:
                        axes.fill_between(xs, *band, color=looks[name]["color"], alpha=0.15, linewidth=0)
                axes.set_xscale("log")
                axes.set_xlabel(x_label)
                axes.set_ylabel(panel.label)
                _ticks_at(axes, {x for curve in panel.curves.values() for x in curve.places})
                if x_falls:
                    axes.invert_xaxis()
                _scale(axes, axes.yaxis, panel)
            all_axes[0][0].legend()
    return paths


def time_pictures(
    rows: list[Row], folder: Path, title: Title, what: str, base: str = STOCK, floor: str | None = None, **options: Any
) -> list[Path]:
    """Plot time against n beside its ratio to the base's, one picture for each setting.

    :param what: What is timed, for the axis.
    :param floor: A provider that does only a part of the work: it has a time and no ratio.
    :param options: As of :func:`curve_pictures`.
    """

    def panels(group: list[Row]) -> tuple[Panel, Panel]:
        return _times_and_ratios([row for row in group if row.p50], lambda row: row.case.n, what, base, floor)

    return curve_pictures(rows, folder, title, panels, **options)


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

    :param label: Names the problem of a row; the others are those of :func:`curve_pictures`.
    """
    paths = []
    for group in grouped(rows, key).values():
        paths.append(folder / file_name(group[0], *part(group[0])))
        names = {row.case: label(row) for row in sorted(group, key=lambda row: row.case.n, reverse=True)}
        height = {case: place for place, case in enumerate(names)}
        made = _times_and_ratios(group, lambda row, height=height: height[row.case], what, STOCK)
        looks = _looks(made[0].curves)
        size = (9.5, 1.7 + 0.32 * len(names))
        with _drawn(paths[-1], title(group[0]), 1, 2, figsize=size, sharey=True) as (figure, all_axes):
            for axes, panel in zip(all_axes, made, strict=True):
                for name, (places, values, band) in panel.curves.items():
                    if band is not None:
                        axes.hlines(places, *band, color=looks[name]["color"])
                    dots = {"label": name} if panel is made[0] else {}
                    axes.plot(values, places, linestyle="", **dots, **looks[name])
                axes.set_xlabel(panel.label)
                _scale(axes, axes.xaxis, panel)
            all_axes[0].set_yticks(range(len(names)), list(names.values()))
            all_axes[0].set_ylim(-0.6, len(names) - 0.4)
            figure.legend(loc="outside lower center", ncols=4)
    return paths


def _scale(axes: Axes, axis: Axis, panel: Panel) -> None:
    """Scale the axis of a panel's values."""
    name = axis.axis_name
    if panel.is_log:
        axes.set(**{f"{name}scale": "log"})
    elif panel.curves:
        least = min(min(curve.values) for curve in panel.curves.values())
        axes.set(**{f"{name}lim": (min(0, 1.1 * least), None)})
    if panel.form is not None:
        axis.set_major_formatter(panel.form)
        axis.set_minor_formatter(NullFormatter())
    if panel.reference is not None:
        (axes.axhline if name == "y" else axes.axvline)(panel.reference, color="0.4", linewidth=1, linestyle="--")
