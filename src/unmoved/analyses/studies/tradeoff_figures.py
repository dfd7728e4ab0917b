"""Draw the front of clean against robust accuracy, and each method's own curve."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from unmoved.core.errors import require_columns
from unmoved.reports.drawing import (
    GRID,
    INK,
    PAPER,
    Look,
    Segment,
    bar,
    canvas,
    count,
    draw_others,
    finished,
    foremost,
    looks,
    place_names,
    style,
)

COLUMNS = ("method", "strength", "n", "on_front")
ENDS = ("", "_low", "_high")
WANTED = [f"{axis}{end}" for axis in ("clean", "robust") for end in ENDS]
MOST_NAMES, LONGEST_NAME = 8, 24


@style()
def pareto(points: pd.DataFrame) -> Figure:
    """Draw clean against robust accuracy: a curve per method, the front as a staircase, hollow where a point is off it.

    Of more than `MOST` methods those on the front have a look of their own, then the most robust; the others are grey.

    Args:
        points: method, strength (NaN where there is none), n, on_front, and clean, robust (shares), each also as _low
            and _high (NaN where there is no interval): the points of a trade-off analysis.

    Raises:
        UnmovedError: a column is missing, or there is no row.
    """
    require_columns(points, [*COLUMNS, *WANTED], "pareto")
    points = points.assign(**{name: 100 * points[name] for name in WANTED}, on_front=points["on_front"].astype(bool))
    methods = {str(name): rows.sort_values("strength") for name, rows in points.groupby("method", sort=False)}
    names = [
        _name(str(method), strength) for method, strength in zip(points["method"], points["strength"], strict=True)
    ]
    named = len(names) <= MOST_NAMES and max(map(len, names)) <= LONGEST_NAME
    front = set(points.loc[points["on_front"], "method"].astype(str))
    shown, others = foremost(list(methods), lambda name: (name not in front, -methods[name]["robust"].max()))
    lines = 0 if named else -(-(len(shown) + bool(others)) // 2)
    figure = canvas(5.0, 3.9 + 0.2 * lines)
    axes = figure.add_subplot()
    styles = looks(list(methods), shown)
    segments: list[Segment] = []
    grey = [(methods[name]["clean"], methods[name]["robust"]) for name in others]
    rest = draw_others(axes, grey, "methods", marker="o", markersize=3)
    for name in shown:
        segments += _draw_method(axes, methods[name], styles[name])
    axes.margins(0.12)
    (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
    axes.set(xlim=(left, min(right, 102)), ylim=(bottom, min(top, 102)))
    # A broad band under the thin curves: a line of its own style would be one more method in black and white.
    staircase = _staircase(points[points["on_front"]], left, bottom)
    axes.plot(*staircase, color=GRID, linewidth=6, zorder=0.5)
    axes.plot(*staircase, color=INK, linewidth=0.8, zorder=1)
    axes.set_xlabel("clean accuracy (%)")
    axes.set_ylabel("robust accuracy (%)")
    if named:
        place_names(figure, list(zip(points["clean"], points["robust"], names, strict=True)), segments)
    else:
        figure.legend(*_keys(axes, {name: styles[name] for name in shown}, rest), loc="outside upper center", ncols=2)
    n = count(points["n"])
    bars = "bars: 95 % bootstrap intervals" if points[WANTED].notna().all(axis=None) else "no intervals"
    figure.supxlabel(f"{n} test images; {bars}\ngrey band: the front; hollow: off it")
    return finished(
        figure,
        f"Clean against robust accuracy, {n} test images, {bars}. A line joins the strengths of one method in their "
        "order. The staircase on the grey band is the front: nothing measured lies above it, and settings off it are "
        "hollow." + (f" In grey: {rest}, the less robust ones." if rest else ""),
    )


def _draw_method(axes: Axes, rows: pd.DataFrame, look: Look) -> list[Segment]:
    """Draw a method's settings, joined in the order of their strength; return the ends of its error bars."""
    axes.plot(rows["clean"], rows["robust"], linewidth=1.2, **look | {"marker": ""})
    for on_front, some in rows.groupby("on_front"):
        face = look["color"] if on_front else PAPER
        marks = look | {"linestyle": "none", "markersize": 7, "markerfacecolor": face}
        axes.plot(some["clean"], some["robust"], zorder=3, **marks)
    measured = rows.dropna(subset=WANTED)
    x, y = ([measured[f"{axis}{end}"].to_numpy() for end in ENDS] for axis in ("clean", "robust"))
    xerr, yerr = bar(x[1], x[0], x[2]), bar(y[1], y[0], y[2])
    axes.errorbar(x[0], y[0], xerr=xerr, yerr=yerr, fmt="none", ecolor=look["color"], elinewidth=0.9)
    segments = [((a, c), (b, c)) for a, b, c in zip(x[1], x[2], y[0], strict=True)]
    return [*segments, *(((c, a), (c, b)) for a, b, c in zip(y[1], y[2], x[0], strict=True))]


def _name(method: str, strength: float) -> str:
    return method if pd.isna(strength) else f"{method} {strength:g}"


def _staircase(front: pd.DataFrame, left: float, bottom: float) -> tuple[np.ndarray, np.ndarray]:
    """Return x and y from the left along each point's height to its clean accuracy, down to the next, to the bottom."""
    steps = front.sort_values("clean")[["clean", "robust"]].to_numpy()
    x = np.r_[left, np.repeat(steps[:, 0], 2)]
    y = np.r_[np.repeat(steps[:, 1], 2), bottom]
    return x, y


def _keys(axes: Axes, styles: dict[str, Look], rest: str) -> tuple[list[Line2D], list[str]]:
    """Make one key a method, line and marker together; what is grey has drawn its own."""
    grey = [line for line in axes.lines if rest and line.get_label() == rest]
    return [axes.plot([], [], **look)[0] for look in styles.values()] + grey, [*styles, *[rest] * len(grey)]
