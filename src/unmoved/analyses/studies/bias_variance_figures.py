"""Draw bias and variance of the risk, against the eps of training and class by class."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from unmoved.core.errors import UnmovedError, require_columns
from unmoved.reports.drawing import COLOURS, INK, PAPER, Fill, Look, bar, canvas, count, finished, style

MEASURES: dict[str, Look] = {
    "risk": {"color": INK, "marker": "D", "linestyle": ":"},
    "bias": {"color": COLOURS[0], "marker": "o", "linestyle": "-"},
    "variance": {"color": COLOURS[1], "marker": "s", "linestyle": "--"},
}
BARS: dict[str, Fill] = {
    "bias": {"facecolor": COLOURS[0], "edgecolor": PAPER, "hatch": "////"},
    "variance": {"facecolor": COLOURS[4], "edgecolor": INK, "hatch": ""},
}
ENDS = ("", "_low", "_high")
ABREAST = 3
UNITS = {"squared error": "squared error", "KL": "cross-entropy (nats)"}


@style()
def bias_variance(
    table: pd.DataFrame, *, loss: str = "KL", correction: str = "k/(k-1)", panel: str = "eval_eps"
) -> Figure:
    """Draw risk, bias and variance against the eps of training, one panel for each value of ``panel``.

    Args:
        table: train_eps, loss, correction, class (-1 for all), n, k, and risk, bias, variance, each also as _low and
            _high: decompositions, one below the other; where there are _std over permutations, bars show them.
        loss, correction: which rows to draw.
        panel: a column (``"eval_eps"``, ``"mode"``); a table without it is one panel.

    Raises:
        UnmovedError: a column is missing, no such row, or two rows of one train_eps in a panel.
    """
    rows = _chosen(table, ["train_eps"], loss, correction, "bias_variance")
    rows = rows[rows["class"] == -1]
    require_columns(rows, ["train_eps"], "bias_variance")
    panels = list(rows.groupby(panel, sort=False)) if panel in rows else [("", rows)]
    across = min(ABREAST, len(panels))
    down = -(-len(panels) // across)
    figure = canvas(5.0 if across == 1 else 3.0 * across, 0.9 + 2.6 * down)
    grid = figure.subplots(down, across, sharex=True, sharey=True, squeeze=False)
    for axes, (value, some) in zip(grid.flat, panels, strict=False):
        some = _one_each(some, "train_eps", "bias_variance").sort_values("train_eps")
        for name, looks in MEASURES.items():
            middle, low, high = (some[f"{name}{end}"] for end in ENDS)
            axes.fill_between(some["train_eps"], low, high, color=looks["color"], alpha=0.15, linewidth=0)
            axes.errorbar(
                some["train_eps"], middle, yerr=some.get(f"{name}_std"), label=name, elinewidth=1, capsize=2, **looks
            )
        axes.set_title(_title(panel, value), fontsize=9.5)
    for axes in list(grid.flat)[len(panels) :]:
        axes.set_visible(False)
    figure.legend(*grid[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=3)
    for row in grid:
        row[0].set_ylabel("mean over the images\n" + UNITS.get(loss, loss))
    for axes in list(grid.flat)[len(panels) - across : len(panels)]:  # the lowest of each column
        axes.set_xlabel("eps in training")
        axes.tick_params(labelbottom=True)
    n, models = _numbers(rows)
    several = "permutations" in rows and rows["permutations"].max() > 1
    std = "; bars: spread (standard deviation) over the splits" if several else ""
    bands = _intervals(rows, "bands")
    figure.supxlabel(_lines(f"{n} test images, {models}; {bands}{std}", figure))
    return finished(
        figure,
        f"Risk ({loss}) = bias + variance (correction: {correction}) of {models} that were trained on disjoint parts "
        f"of the training set, against the eps of training; {n} test images; {bands}{std}.",
    )


@style()
def bias_variance_by_class(
    table: pd.DataFrame,
    classes: Sequence[str] = (),
    *,
    loss: str = "KL",
    correction: str = "k/(k-1)",
    most: int = 20,
) -> Figure:
    """Draw bias and variance of each class, as bars with intervals; of many classes the ``most`` of highest risk.

    Args:
        table: one decomposition: loss, correction, class, n, k, and risk, bias, variance, each also as _low and _high.
        classes: names by class number; the numbers themselves where there is none.
        loss, correction: which rows to draw.

    Raises:
        UnmovedError: a column is missing, no row of a class, or two rows of one class.
    """
    rows = _chosen(table, [], loss, correction, "bias_variance_by_class")
    rows = rows[rows["class"] >= 0]
    require_columns(rows, ["class"], "bias_variance_by_class")
    rows = _one_each(rows, "class", "bias_variance_by_class").set_index("class")
    shown = rows.loc[sorted(rows["risk"].nlargest(most).index)]
    figure = canvas(5.0, 1.5 + 0.36 * len(shown))
    axes = figure.add_subplot()
    for (name, looks), shift in zip(BARS.items(), (-0.2, 0.2), strict=True):
        middle, low, high = (shown[f"{name}{end}"].to_numpy(float) for end in ENDS)
        places = np.arange(len(shown)) + shift
        axes.barh(places, middle, 0.36, label=name, linewidth=0.8, **looks)
        if np.isfinite([low, high]).all():
            xerr = bar(low, middle, high)
            axes.errorbar(middle, places, xerr=xerr, fmt="none", ecolor=INK, elinewidth=1.2, capsize=2)
    names = [str(classes[label]) if label < len(classes) else str(label) for label in shown.index]
    axes.set_yticks(range(len(shown)), names)
    axes.set_ylim(len(shown) - 0.5, -0.5)
    axes.set_xlabel(UNITS.get(loss, loss))
    axes.set_ylabel("class")
    axes.grid(axis="y", visible=False)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside upper center", ncols=2, handleheight=1.1)
    n, models = _numbers(shown)
    part = f", the {most} of highest risk of {len(rows)}" if len(rows) > len(shown) else ""
    bars = _intervals(shown, "bars")
    figure.supxlabel(_lines(f"{n} test images per class{part}, {models}; {bars}", figure))
    return finished(
        figure,
        f"Bias and variance by class{part} ({loss}, correction: {correction}) over {models} that were trained on "
        f"disjoint parts of the training set; {n} test images per class; {bars}.",
    )


def _chosen(table: pd.DataFrame, columns: Sequence[str], loss: str, correction: str, figure: str) -> pd.DataFrame:
    wanted = [f"{name}{end}" for name in MEASURES for end in ENDS]
    require_columns(table, [*columns, "loss", "correction", "class", "n", "k", *wanted], figure)
    rows = table[(table["loss"] == loss) & (table["correction"] == correction)]
    if rows.empty:
        there = sorted(set(zip(table["loss"], table["correction"], strict=True)))
        raise UnmovedError(f"{figure}: expected rows of {loss!r} with {correction!r}, came only {there}")
    return rows


def _one_each(rows: pd.DataFrame, column: str, figure: str) -> pd.DataFrame:
    if rows[column].duplicated().any():
        twice = rows.loc[rows[column].duplicated(), column].iloc[0]
        raise UnmovedError(
            f"{figure}: expected one row for each {column}, came several for {twice:g}; merge permutations first and "
            "choose the rows of one condition"
        )
    return rows


def _lines(text: str, figure: Figure) -> str:
    """Break a text so that it fits the figure's width at the small size of such a line."""
    return "\n".join(textwrap.wrap(text, int(14 * figure.get_figwidth())))


def _title(panel: str, value: object) -> str:
    words = {"eval_eps": "attacked with eps = {:.4g}", "mode": "attack: {}"}
    return words.get(panel, panel + ": {}").format(value) if value != "" else ""


def _intervals(rows: pd.DataFrame, how: str) -> str:
    ends = [f"{name}{end}" for name in MEASURES for end in ENDS[1:]]
    return f"{how}: 95 % bootstrap intervals over the images" if rows[ends].notna().any(axis=None) else "no intervals"


def _numbers(rows: pd.DataFrame) -> tuple[str, str]:
    k, n = count(rows["k"]).removeprefix("n = "), count(rows["n"])
    splits = int(rows["permutations"].max()) if "permutations" in rows else 1
    return n, f"{k} models" + (f" from each of {splits} splits" if splits > 1 else "")
