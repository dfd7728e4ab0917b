"""Draw the loss under corrupted weights: curves over eps, bars by layer, the surface, and robustness beside it."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator
from matplotlib.typing import LineStyleType

from unmoved.core.errors import UnmovedError, require_columns
from unmoved.reports.drawing import (
    INK,
    PAPER,
    Fill,
    Look,
    Segment,
    bar,
    canvas,
    count,
    draw_others,
    finished,
    foremost,
    looks,
    name_points,
    style,
)
from unmoved.reports.figures.broken_by import HATCHES

KINDS: dict[str, LineStyleType] = {"adversarial": "-", "random": (0, (4, 2))}
BLACK = "#000000"  # on grey areas, which stay as they are where a page turns dark
LINEAR = 1e-3  # nats: below it the axis of a loss change is linear, since random changes may be negative
PLAIN = FuncFormatter(lambda value, _: f"{value:g}")  # matplotlib's own would be formulas, which our style leaves raw
MEANS = "95 % intervals of the mean over draws"


@style()
def corruption_curves(table: pd.DataFrame) -> Figure:
    """Draw change of loss (above) and accuracy (below) against eps, per run the worst corruption and the random mean.

    Args:
        table: run, measure ("loss" or "accuracy"), kind ("random" or "adversarial"), eps_relative, mean, low, high,
            draws, images: from `summarise`, of one scope and one p.

    Raises:
        UnmovedError: a column is missing, there is no row, or one line would have two values at one eps.
    """
    keys = ["run", "measure", "kind", "eps_relative"]
    require_columns(table, [*keys, "mean", "low", "high", "draws", "images"], "corruption_curves")
    _require_single(table, keys, "corruption_curves")
    runs, others = _flattest(table)
    styles = looks(list(dict.fromkeys(table["run"])), runs)
    figure = canvas(5.0, 5.2 + 0.2 * math.ceil((len(runs) + bool(others)) / 2))
    top, bottom = figure.subplots(2, 1, sharex=True)
    panels = (("loss", top, 1.0, "loss change (nats)"), ("accuracy", bottom, 100.0, "accuracy change (points)"))
    for measure, axes, scale, label in panels:
        of = table[(table["measure"] == measure) & (table["kind"] == "adversarial")].sort_values("eps_relative")
        lines = [(rows["eps_relative"], scale * rows["mean"]) for run, rows in of.groupby("run") if run in set(others)]
        rest = draw_others(axes, lines, "runs")
        for run in runs:
            ours: Look = {"color": styles[run]["color"], "marker": styles[run]["marker"]}
            for kind, line in KINDS.items():
                rows = table[(table["measure"] == measure) & (table["run"] == run) & (table["kind"] == kind)]
                rows = rows.sort_values("eps_relative")
                x, mean, low, high = (rows[c].to_numpy(float) for c in ("eps_relative", "mean", "low", "high"))
                if kind == "random":
                    axes.fill_between(x, scale * low, scale * high, color=ours["color"], alpha=0.15, linewidth=0)
                face = PAPER if kind == "random" else ours["color"]
                axes.plot(x, scale * mean, linestyle=line, label=f"{run} ({kind})", markerfacecolor=face, **ours)
        axes.axhline(0, color=INK, linewidth=0.9, zorder=1)
        axes.set_ylabel(label)
    drawn = table.loc[table["measure"] == "loss", ["mean", "low", "high"]]
    limits = 2 * min(float(drawn.min().min()), -LINEAR / 2), 2 * max(float(drawn.max().max()), LINEAR)
    top.set_yscale("symlog", linthresh=LINEAR)
    top.set_ylim(*limits)
    top.set_yticks(_ticks(*limits))
    top.yaxis.set_major_formatter(PLAIN)
    top.yaxis.set_minor_locator(NullLocator())
    _log(top)
    bottom.set_xlabel("size of the corruption, eps / ||w||")
    handles, names = top.get_legend_handles_labels()
    figure.legend(handles, names, loc="outside upper center", ncols=2 if max(map(len, names)) <= 30 else 1)
    n, draws = count(table["images"]), _draws(table)
    figure.supxlabel(f"{n} images; random: mean of {draws} draws; bands: 95 % intervals")
    return finished(
        figure,
        f"How much loss and accuracy change when the weights are corrupted ({n} images). Solid and filled: the worst "
        f"corruption that the attack found; dashed and hollow: the mean of {draws} random ones of the same size, bands "
        f"are {MEANS}. The axis of the loss is logarithmic above {LINEAR:g} nats and linear below."
        + (f" In grey, the worst corruption alone: {rest}, less flat than the {len(runs)} named." if rest else ""),
    )


@style()
def corruption_layers(table: pd.DataFrame) -> Figure:
    """Draw the loss change by layer at one relative eps: bars for the worst corruption, markers for the random mean.

    Args:
        table: run, scope, kind, mean, low, high, eps_relative, draws, images: the loss rows of `summarise` at one eps.

    Raises:
        UnmovedError: a column is missing, there is no row, several eps, or a layer twice in one run and kind.
    """
    needed = ["run", "scope", "kind", "mean", "low", "high", "eps_relative", "draws", "images"]
    require_columns(table, needed, "corruption_layers")
    if "measure" in table:
        table = table[table["measure"] == "loss"]
    sizes = sorted({float(f"{value:.6g}") for value in table["eps_relative"]})
    if len(sizes) != 1:
        raise UnmovedError(f"corruption_layers: expected one eps_relative, came {sizes}; choose the rows of one")
    _require_single(table, ["run", "scope", "kind"], "corruption_layers")
    (runs, others), scopes = _flattest(table), list(dict.fromkeys(table["scope"]))
    styles = looks(list(dict.fromkeys(table["run"])), runs)
    thick = 0.8 / len(runs)
    figure = canvas(5.0, 1.4 + 0.2 * len(runs) + (0.16 + 0.2 * len(runs)) * len(scopes))
    axes = figure.add_subplot()
    for k, run in enumerate(runs):
        places = np.arange(len(scopes)) + (k - (len(runs) - 1) / 2) * thick
        of = table[table["run"] == run]
        worst, random = (of[of["kind"] == kind].set_index("scope").reindex(scopes) for kind in KINDS)
        hatched: Fill = {"facecolor": styles[run]["color"], "edgecolor": PAPER, "hatch": HATCHES[k % len(HATCHES)]}
        axes.barh(places, worst["mean"], 0.92 * thick, label=f"{run} (adversarial)", linewidth=0.6, **hatched)
        ends = np.nan_to_num(bar(random["low"], random["mean"], random["high"]))
        hollow: Look = {"color": INK, "markerfacecolor": PAPER, "linestyle": "none"}
        label = f"{run} (random mean)"
        axes.errorbar(
            random["mean"], places, xerr=ends, label=label, elinewidth=1, markersize=4.5, **styles[run] | hollow
        )
    axes.axvline(0, color=INK, linewidth=0.9)
    axes.set_yticks(range(len(scopes)), [str(scope) for scope in scopes])
    axes.set_ylim(len(scopes) - 0.4, -0.6)
    axes.grid(visible=False, axis="y")
    axes.set_xlabel("loss change (nats)")
    axes.set_ylabel("layer")
    handles, names = axes.get_legend_handles_labels()
    figure.legend(handles, names, loc="outside upper center", ncols=2 if max(map(len, names)) <= 30 else 1)
    n, size = count(table["images"]), f"eps = {sizes[0]:g} of the layer's own norm"
    figure.supxlabel(f"{size}; {n} images")
    return finished(
        figure,
        f"Loss change when one layer alone is corrupted, {size} ({n} images): bars are the worst corruption that the "
        f"attack found, markers the mean of {_draws(table)} random ones with {MEANS}."
        + (f" Left out, less flat than the {len(runs)} that are shown: {len(others)} runs." if others else ""),
    )


def _flattest(table: pd.DataFrame) -> tuple[list[str], list[str]]:
    """Return the runs whose loss the worst corruption changes least, at its largest, and the others."""
    of = table[table["kind"] == "adversarial"]
    of = of[of["measure"] == "loss"] if "measure" in of else of
    largest = of.groupby("run")["mean"].max().to_dict()
    return foremost(list(dict.fromkeys(table["run"])), lambda run: largest.get(run, math.inf))


@style()
def loss_lines(table: pd.DataFrame) -> Figure:
    """Draw the loss along the worst direction and along a random one, through the weights.

    Args:
        table: direction ("worst" or "random"), a (in units of eps), eps, loss, images: from `surface.axes`.

    Raises:
        UnmovedError: a column is missing, or there is no row.
    """
    require_columns(table, ["direction", "a", "eps", "loss", "images"], "loss_lines")
    figure = canvas(5.0, 3.4)
    axes = figure.add_subplot()
    for name, line in (("worst", "-"), ("random", KINDS["random"])):
        rows = table[table["direction"] == name].sort_values("a")
        face = PAPER if name == "random" else INK
        looked: Look = {"color": INK, "marker": "o", "markerfacecolor": face, "linestyle": line, "markersize": 4}
        axes.plot(rows["a"], rows["loss"], label=f"{name} direction", **looked)
    axes.axvline(0, color=INK, linewidth=0.9, zorder=1)
    axes.set_xlabel("distance from the weights, in units of eps")
    axes.set_ylabel("loss (nats)")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside upper center", ncols=2)
    n, eps = count(table["images"]), f"eps = {table['eps'].iloc[0]:.4g}"
    figure.supxlabel(f"{eps}; {n} images")
    return finished(figure, f"Loss on two lines through the trained weights, directions of length {eps} ({n} images).")


@style()
def loss_surface(table: pd.DataFrame, levels: int = 7) -> Figure:
    """Draw the loss over the plane of the worst and a random direction: darker is higher, every line carries its value.

    Lines of equal loss rise with the square of their number, so that those of a bowl lie evenly; in log(loss) evenly
    where the loss spans more than a factor of 100.

    Args:
        table: a, b (in units of eps), eps, loss, images: from `surface.plane`, a full grid.
        levels: about how many lines.

    Raises:
        UnmovedError: a column is missing, there is no row, or the grid is not full and at least 2 by 2.
    """
    require_columns(table, ["a", "b", "eps", "loss", "images"], "loss_surface")
    _require_single(table, ["a", "b"], "loss_surface")
    grid = table.pivot(index="b", columns="a", values="loss").sort_index().sort_index(axis=1)
    loss = grid.to_numpy(float)
    if min(loss.shape) < 2 or not np.isfinite(loss).all():
        raise UnmovedError(f"loss_surface: expected a full grid of at least 2 x 2, came {loss.shape} with gaps or less")
    low, high = float(loss.min()), float(loss.max())
    spread = low > 0 and high > 100 * low
    steps = np.geomspace(low, high, levels + 2) if spread else low + (high - low) * np.linspace(0, 1, levels + 2) ** 2
    figure = canvas(4.6, 4.4)
    axes = figure.add_subplot()
    if high > low:
        greys = [str(grey) for grey in np.linspace(0.97, 0.45, levels + 1)]
        axes.contourf(grid.columns, grid.index, loss, levels=steps, colors=greys)
        lines = axes.contour(grid.columns, grid.index, loss, levels=steps[1:-1], colors=BLACK, linewidths=0.7)
        axes.clabel(lines, fmt="%.3g", fontsize=8, colors=BLACK)
    axes.plot(0, 0, "x", color=BLACK, markersize=8, markeredgewidth=2)
    axes.grid(visible=False)
    axes.set_aspect("equal")
    axes.set_xlabel("along the worst direction, in units of eps")
    axes.set_ylabel("along a random direction, in units of eps")
    n, eps = count(table["images"]), f"eps = {table['eps'].iloc[0]:.4g}"
    figure.supxlabel(f"loss {low:.3g} to {high:.3g} nats; {eps}; {n} images")
    return finished(
        figure,
        f"Loss around the trained weights (the cross), from {low:.3g} to {high:.3g} nats, darker is higher; {eps}, "
        f"{n} images. Lines of equal loss, {'evenly spaced in log(loss)' if spread else 'closer at low loss'}.",
    )


@style()
def flatness(table: pd.DataFrame, sentence: str = "") -> Figure:
    """Draw robust accuracy against I_max, one marker and name per run: if flat goes with robust, the markers fall.

    Args:
        table: name, i_max, robust_accuracy (a share), images; low and high (shares), where they are, as error bars.
        sentence: what the correlation says, for the caption.

    Raises:
        UnmovedError: a column is missing, there is no row, or an I_max that is not above 0.
    """
    require_columns(table, ["name", "i_max", "robust_accuracy", "images"], "flatness")
    if not (table["i_max"] > 0).all():
        raise UnmovedError(f"flatness: expected i_max above 0 for a log axis, came {table['i_max'].min():g}; raise eps")
    figure = canvas(5.0, 3.7)
    axes = figure.add_subplot()
    points, segments = [], list[Segment]()
    accuracy = 100 * table["robust_accuracy"].to_numpy(float)
    shown, others = foremost(range(len(table)), lambda k: -accuracy[k])
    grey = [(float(table["i_max"].iloc[k]), float(accuracy[k])) for k in others]
    rest = draw_others(axes, grey, "runs", marker="o", linestyle="none")
    styles = looks(list(table["name"].astype(str)), list(table["name"].iloc[shown].astype(str)))
    for row in table.iloc[shown].to_dict("records"):
        x, y = float(row["i_max"]), 100 * float(row["robust_accuracy"])
        ours = styles[str(row["name"])] | {"linestyle": "none", "markersize": 9, "markeredgecolor": PAPER}
        low, high = (100 * float(row.get(name, row["robust_accuracy"])) for name in ("low", "high"))
        label = str(row["name"])
        axes.errorbar(x, y, yerr=bar([low], [y], [high]), label=label, elinewidth=1, **ours)
        points.append((x, y, label))
        segments.append(((x, low), (x, high)))
    axes.margins(0.12)
    _log(axes)
    axes.set_xlabel("I_max, largest loss change found (nats)")
    axes.set_ylabel("robust accuracy (%)")
    n = count(table["images"])
    figure.supxlabel(
        f"{len(table)} runs; {n} images"
        + ("; bars: 95 % intervals" if "low" in table else "")
        + (f"; grey: {rest}" if rest else "")
    )
    name_points(figure, points, segments, others)
    return finished(
        figure,
        f"Robust accuracy against the largest loss change under corruption of the weights, {len(table)} runs ({n} "
        f"images). {sentence}".strip()
        + (f" Named are the most robust; in grey: {rest}." if rest else ""),
    )


def _log(axes: Axes) -> None:
    """Make the x axis logarithmic, with plain numbers, and at least a few of them on less than a decade."""
    axes.set_xscale("log")
    low, high = axes.get_xlim()
    decades = math.log10(high / low)
    marks = MaxNLocator(5) if decades < 0.7 else LogLocator(subs=(1, 2, 5) if decades < 2.5 else (1,))
    axes.xaxis.set_major_locator(marks)
    axes.xaxis.set_major_formatter(PLAIN)
    axes.xaxis.set_minor_formatter(NullFormatter())


def _ticks(low: float, high: float) -> list[float]:
    """Return 0 and at most about six powers of ten a side that an axis from low to high shows."""
    first = round(math.log10(LINEAR))
    last = math.floor(math.log10(max(high, -low)))
    powers = [float(f"1e{power}") for power in range(first, last + 1, math.ceil((last - first) / 6) or 1)]
    return (
        [-value for value in reversed(powers) if -value >= low] + [0.0] + [value for value in powers if value <= high]
    )


def _draws(table: pd.DataFrame) -> str:
    draws = table.loc[table["kind"] == "random", "draws"]
    return count(draws).removeprefix("n = ") if len(draws) else "no"


def _require_single(table: pd.DataFrame, keys: list[str], figure: str) -> None:
    twice = table.duplicated(keys)
    if twice.any():
        row = {key: table.loc[twice, key].iloc[0] for key in keys}
        raise UnmovedError(f"{figure}: expected one row for each {', '.join(keys)}, came {row} twice; choose one scope")
