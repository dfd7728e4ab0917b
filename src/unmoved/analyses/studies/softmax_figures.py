"""Draw what the softmax over the wrong classes predicts: which samples break, to which class, which runs are robust."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Collection

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from unmoved.core.errors import UnmovedError, require_columns
from unmoved.reports.drawing import (
    INK,
    PAPER,
    Look,
    bar,
    canvas,
    count,
    draw_others,
    finished,
    foremost,
    looks,
    name_points,
    percent_limits,
    style,
)

NAMES = {
    "variance": "variance of log p,\nwrong classes",
    "std": "std of p,\nwrong classes",
    "entropy": "entropy of the\nwrong classes",
    "gap": "gap of the top two\nwrong classes",
    "p_true": "p of the\ntrue class",
    "margin": "margin",
}
UNITS = {
    "variance": "nats^2",
    "std": "probability",
    "entropy": "nats",
    "gap": "nats",
    "p_true": "probability",
    "margin": "nats",
}
CHANCE: Look = {"color": INK, "linewidth": 0.9, "linestyle": (0, (4, 2)), "zorder": 1}
POINTS: Look = {"linestyle": "none", "markeredgecolor": PAPER, "markeredgewidth": 0.3}


@style()
def within(
    table: pd.DataFrame, *, view: str = "clean", measure: str = "AUC", foremost_runs: Collection[str] = ()
) -> Figure:
    """Draw a forest of intervals: how well each statistic tells who falls, by statistic and run; 0.5 (or 0) is chance.

    Of more than `MOST` runs the foremost are told apart, and the others are grey points in a lane of their own.

    Args:
        table: run, view, statistic, measure, value, low, high, n: `analyses.softmax.within` of each run, one below the
            other. Without an interval a marker stands alone; without a value there is none.
        view: which view's rows.
        measure: ``"AUC"`` (against success) or ``"Spearman"`` (against the minimal eps).
        foremost_runs: which those are; by default the first.

    Raises:
        UnmovedError: a column is missing, or there is no row of this view and measure.
    """
    require_columns(table, ["run", "view", "statistic", "measure", "value", "low", "high", "n"], "within")
    table = table[(table["view"] == view) & (table["measure"] == measure)]
    require_columns(table, ["run"], f"within, view {view!r}, measure {measure!r}")
    names = list(dict.fromkeys(table["statistic"]))
    runs = {str(run): rows.set_index("statistic").reindex(names) for run, rows in table.groupby("run", sort=False)}
    shown, others = foremost(list(runs), lambda run: run not in foremost_runs)
    lanes = len(shown) + bool(others)
    pitch = 0.13 * lanes + 0.24
    figure = canvas(5.6, 1.2 + pitch * len(names) + 0.2 * math.ceil(lanes / 2))
    axes = figure.add_subplot()
    heights = np.arange(len(names)) + (np.arange(lanes)[:, None] - (lanes - 1) / 2) * 0.13 / pitch
    styles = looks(list(runs), shown)
    for run, height in zip(shown, heights, strict=False):
        _forest(axes, runs[run], height, run, styles[run])
    grey = [(runs[run]["value"], heights[-1]) for run in others]
    rest = draw_others(axes, grey, "runs", marker="o", linestyle="none")
    chance = 0.5 if measure == "AUC" else 0.0
    axes.axvline(chance, **CHANCE)
    for border in np.arange(1, len(names)) - 0.5:
        axes.axhline(border, color=INK, linewidth=0.4)
    axes.set_yticks(range(len(names)), [NAMES.get(name, name) for name in names], fontsize=9)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.grid(visible=False, axis="y")
    axes.set_xlim(*((-0.02, 1.02) if measure == "AUC" else (-1.04, 1.04)))
    correlation = "Spearman's correlation with the minimal eps"
    axes.set_xlabel("AUC: P(larger for an image that falls)" if measure == "AUC" else correlation)
    axes.set_ylabel(f"statistic of the {view} image")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside upper center", ncols=2)
    n = count(table["n"])
    figure.supxlabel(f"{n} images that the model gets right\ndashed: chance; bars: 95 % bootstrap intervals")
    return finished(
        figure,
        f"What each statistic of the {view} image says of the attack, by run ({measure}). {n} images that the model "
        f"gets right, bars are 95 % bootstrap intervals over images. At {chance:g} (dashed) a statistic says nothing; "
        "one that lies nearer to it than the margin says less than the margin."
        + (f" In grey: {rest}." if rest else ""),
    )


def _forest(axes: Axes, rows: pd.DataFrame, height: np.ndarray, run: str, style: Look) -> None:
    """Draw a run's values with their intervals, each at its height."""
    middle, low, high = (rows[name].to_numpy(float) for name in ("value", "low", "high"))
    ends = np.where(np.isnan(low) | np.isnan(middle), 0, bar(low, middle, high))
    axes.errorbar(middle, height, xerr=ends, label=run, elinewidth=1, **style | POINTS)


@style()
def landings(table: pd.DataFrame, *, most: int = 20) -> Figure:
    """Draw where the fallen land: the share by rank of the clean image's wrong classes, one small panel per run.

    Args:
        table: run, rank, share, low, high, n, uniform: `analyses.softmax.landings` of each run, one below the other.
        most: ranks that are drawn, where there are more.

    Raises:
        UnmovedError: a column is missing, there is no row, or nothing fell in any run.
    """
    require_columns(table, ["run", "rank", "share", "low", "high", "n", "uniform"], "landings")
    ranks = int(table["rank"].max())
    stand = ", ".join(dict.fromkeys(table.loc[table["share"].isna(), "run"].astype(str)))
    styles = looks(list(table["run"].astype(str)))
    table = table[(table["rank"] <= most) & table["share"].notna()]
    if table.empty:
        raise UnmovedError("landings: expected a run where an attack succeeded, came none; there is nothing to draw")
    runs, drawn = list(table.groupby("run", sort=False)), int(table["rank"].max())
    columns = min(3, len(runs))
    lines = math.ceil(len(runs) / columns)
    figure = canvas(5.6, 1.25 + 1.75 * lines + 0.6 * (lines == 1))
    panels = figure.subplots(lines, columns, squeeze=False, sharex=True, sharey=True)
    for axes, (run, rows) in zip(panels.flat, runs, strict=False):
        share, low, high = (100 * rows[name].to_numpy(float) for name in ("share", "low", "high"))
        axes.bar(rows["rank"], share, 0.75, color=styles[str(run)]["color"], edgecolor=INK, linewidth=0.6)
        black = {"color": INK, "linestyle": "none", "elinewidth": 1, "capsize": 2 if drawn <= 10 else 0}
        axes.errorbar(rows["rank"], share, yerr=bar(low, share, high), **black)
        axes.axhline(100 * rows["uniform"].iloc[0], **CHANCE)
        axes.set_title("\n".join([*textwrap.wrap(str(run), 24 if columns > 1 else 48), count(rows["n"])]), fontsize=9)
        axes.grid(visible=False, axis="x")
    for axes in list(panels.flat)[len(runs) :]:
        axes.set_visible(False)
    panels[0, 0].set_ylim(0, min(105, max(5.0, 1.08 * float(100 * table["high"].max()))))
    panels[0, 0].set_xlim(0.3, drawn + 0.7)
    panels[0, 0].set_xticks(range(1, drawn + 1, 1 + drawn // 8))
    figure.supylabel("share of the fallen images (%)", fontsize=10)
    n, part = count(table["n"]), f" (the first {most} of {ranks} ranks)" if ranks > most else ""
    figure.supxlabel(
        "rank of the new class among the clean image's wrong ones, 1 = the most probable\n"
        f"{n} fallen images per run{part}\ndashed: uniform; bars: 95 % Wilson intervals"
    )
    return finished(
        figure,
        f"Where the attack lands: the rank of the new class among the wrong classes of the clean image{part}. "
        f"{n} fallen images per run, bars are 95 % Wilson intervals; dashed: no preference."
        + (f" No image fell in: {stand}." if stand else ""),
    )


@style()
def across(
    table: pd.DataFrame,
    correlations: pd.DataFrame | None = None,
    *,
    statistic: str = "variance",
    against: str = "robust_accuracy",
) -> Figure:
    """Draw the mean of a statistic against robust (or clean) accuracy: one named marker per run.

    Of more than `MOST` runs the most accurate have a name, and the others are grey points.

    Args:
        table: run, n, robust_accuracy, clean_accuracy and the statistic: from `analyses.softmax.summary`.
        correlations: statistic, against, measure, value, low, high: from `analyses.softmax.across`; written below.
        statistic: the column for x.
        against: ``"robust_accuracy"`` or ``"clean_accuracy"``.

    Raises:
        UnmovedError: a column is missing, or there is no row.
    """
    require_columns(table, ["run", "n", against, statistic], "across")
    figure = canvas(5.0, 3.7)
    axes = figure.add_subplot()
    columns = table["run"].astype(str), table[statistic].astype(float), 100 * table[against].astype(float)
    points = [(x, y, run) for run, x, y in zip(*columns, strict=True)]
    shown, others = foremost(range(len(points)), lambda k: -points[k][1])
    rest = draw_others(axes, [points[k][:2] for k in others], "runs", marker="o", linestyle="none")
    styles = looks([run for *_, run in points], [points[k][2] for k in shown])
    points = [points[k] for k in shown]
    for x, y, run in points:
        axes.plot([x], [y], label=run, markersize=9, **styles[run] | POINTS)
    axes.margins(0.15)
    name = NAMES.get(statistic, statistic).replace("\n", " ")
    unit = UNITS.get(statistic)
    axes.set_xlabel(f"mean over the clean images:\n{name}" + (f" ({unit})" if unit else ""))
    accuracy = against.replace("_", " ")
    axes.set_ylabel(f"{accuracy} (%)")
    axes.set_ylim(*percent_limits(*axes.get_ylim()))
    n = f"{count(table['n'])} test images per run, {len(table)} runs"
    measured = _measured(correlations, statistic, accuracy)
    figure.supxlabel(n + "".join(f"\n{words}" for words in (*measured, *[f"grey: {rest}"][: len(others)])))
    name_points(figure, points, [], others)
    ends = ". " + "; ".join(measured) + " (95 % intervals by Fisher's z)" if measured else ""
    return finished(
        figure,
        f"The mean {name} against {accuracy}, one marker per run: {n}{ends}."
        + (f" Named are those of the highest accuracy; in grey: {rest}." if rest else ""),
    )


def _measured(correlations: pd.DataFrame | None, statistic: str, accuracy: str) -> list[str]:
    if correlations is None:
        return []
    require_columns(correlations, ["statistic", "against", "measure", "value", "low", "high"], "across, correlations")
    rows = correlations[(correlations["statistic"] == statistic) & (correlations["against"] == accuracy)]
    correlated = []
    for measure, value, low, high in rows[["measure", "value", "low", "high"]].itertuples(index=False):
        if not np.isnan(value):
            correlated.append(f"{measure} {value:+.2f}" + ("" if np.isnan(low) else f" [{low:+.2f}, {high:+.2f}]"))
    return correlated
