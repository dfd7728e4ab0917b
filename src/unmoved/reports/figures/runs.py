"""Draw accuracies, training curves and example images of runs; the same table always gives the same bytes.

Every figure carries its caption, with the n, as its label: ``figure.get_label()``. Intervals are drawn as the table
gives them: 95 % Wilson intervals of the n test images; for several seeds the hull of the seeds' intervals.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from unmoved.core.errors import UnmovedError, require_columns
from unmoved.evaluation.outcomes import CLEAN, WORST
from unmoved.reports.drawing import (
    COLOURS,
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
    front,
    legend_above,
    look,
    name_points,
    percent_limits,
    style,
)

MEASURES: dict[str, Look] = {
    CLEAN: {"color": COLOURS[0], "marker": "o", "linestyle": "-"},
    WORST: {"color": COLOURS[1], "marker": "s", "linestyle": "--"},
}
INTERVALS, HULL = "95 % Wilson intervals", " (with several seeds, from the lowest to the highest of theirs)"
DOTTED: Look = {"color": INK, "linewidth": 0.9, "linestyle": (0, (2, 2)), "zorder": 1}


@style()
def tradeoff(table: pd.DataFrame) -> Figure:
    """Draw clean against worst-case accuracy: one marker and name per recipe, single seeds as faint points.

    Of more than `MOST` recipes some on the front have a name, then the most robust; the others are grey points.

    Args:
        table: recipe, seed, measure, accuracy, low, high (shares), n: `outcomes.summary` of each run, one below other.

    Raises:
        UnmovedError: a column is missing, or there is no row.
    """
    require_columns(table, ["recipe", "seed", "measure", "accuracy", "low", "high", "n"], "tradeoff")
    _require_measures(table, "tradeoff")
    figure = canvas(5.0, 3.7)
    axes = figure.add_subplot()
    points, segments, seeds = [], list[Segment](), 1
    means = table.groupby(["recipe", "measure"], sort=False)["accuracy"].mean().unstack()
    top = front(means[CLEAN], means[WORST])
    recipes = list(dict.fromkeys(table["recipe"]))
    shown, others = foremost(recipes, lambda recipe: (recipe not in top, -means.loc[recipe, WORST]))
    grey = 100 * means.loc[others, list(MEASURES)].to_numpy(float)
    rest = draw_others(axes, [(x, y) for x, y in grey], "recipes", marker="o", linestyle="none")
    for k, recipe in enumerate(shown):
        rows, looks = table[table["recipe"] == recipe], look(k)
        looks["linestyle"] = "none"
        x, y = (100 * rows[rows["measure"] == name].set_index("seed")[["accuracy", "low", "high"]] for name in MEASURES)
        if len(x) > 1:
            seeds = max(seeds, len(x))
            axes.plot(x["accuracy"], y["accuracy"].loc[x.index], alpha=0.35, markeredgewidth=0, **looks)
        (left, middle, right), (down, centre, up) = (
            (z["low"].min(), z["accuracy"].mean(), z["high"].max()) for z in (x, y)
        )
        xerr, yerr = bar([left], [middle], [right]), bar([down], [centre], [up])
        looks |= {"markersize": 9, "markeredgecolor": PAPER}
        axes.errorbar(middle, centre, xerr=xerr, yerr=yerr, label=str(recipe), elinewidth=1, **looks)
        points.append((middle, centre, str(recipe)))
        segments += [((left, centre), (right, centre)), ((middle, down), (middle, up))]
    axes.margins(0.12)
    axes.set_xlabel("clean accuracy (%)")
    axes.set_ylabel("worst-case accuracy (%)")
    n = count(table["n"])
    figure.supxlabel(f"{n} test images; bars: {INTERVALS}" + (f"\ngrey: {rest}" if rest else ""))
    axes.set(xlim=percent_limits(*axes.get_xlim()), ylim=percent_limits(*axes.get_ylim()))
    name_points(figure, points, segments, others)
    several = f"{HULL}. Faint points are single seeds." if seeds > 1 else "."
    return finished(
        figure,
        "Clean against worst-case accuracy: further up is more robust, further right is more accurate without an "
        f"attack. {n} test images, bars are {INTERVALS}{several}"
        + (f" Named are {len(shown)}: along the front, then the most robust; grey: {rest}." if rest else ""),
    )


@style()
def robustness_curve(table: pd.DataFrame, *, norm: str = "", eps: float | None = None) -> Figure:
    """Draw accuracy against eps, one line with its band per recipe (and attack, where there are several).

    Of more than `MOST` lines those of the highest accuracy at ``eps`` are told apart, and the others are grey.

    Args:
        table: recipe, attack, eps, accuracy, low, high (shares), n: from `outcomes.curve_summary`.
        norm: the norm in which eps is measured, for the axis.
        eps: the eps of the verdict, marked by a line.

    Raises:
        UnmovedError: a column is missing, or there is no row.
    """
    require_columns(table, ["recipe", "attack", "eps", "accuracy", "low", "high", "n"], "robustness_curve")
    lines = {keys: rows.sort_values("eps") for keys, rows in table.groupby(["recipe", "attack"], sort=False)}
    shown, others = foremost(list(lines), lambda keys: -_at(lines[keys], eps))
    figure = canvas(5.0, 3.3 + 0.1 * (len(shown) + bool(others)))
    axes = figure.add_subplot()
    attacks = [str(name) for name in table["attack"].unique()]
    rest = draw_others(axes, [(lines[keys]["eps"], 100 * lines[keys]["accuracy"]) for keys in others], "lines")
    for k, keys in enumerate(shown):
        rows, looks = lines[keys], look(k)
        name = "{} ({})".format(*keys) if len(attacks) > 1 else str(keys[0])
        axes.fill_between(
            rows["eps"], 100 * rows["low"], 100 * rows["high"], color=looks["color"], alpha=0.15, linewidth=0
        )
        axes.plot(rows["eps"], 100 * rows["accuracy"], label=name, **looks)
    if eps is not None:
        axes.axvline(eps, **DOTTED)
        axes.annotate(
            f"eps = {eps:.4g}",
            (eps, 1),
            xytext=(-3, 0),
            xycoords=("data", "axes fraction"),
            textcoords="offset points",
            fontsize=8.5,
            rotation=90,
            ha="right",
            va="top",
        )
    axes.set_ylim(0, 102)
    axes.set_xlabel("size of the perturbation, eps" + (f" ({norm}, pixels in [0, 1])" if norm else ""))
    axes.set_ylabel("accuracy under attack (%)")
    legend_above(figure, grow=False)
    n, names = count(table["n"]), ", ".join(attacks)
    figure.supxlabel(f"{n} test images, attack: {names}; bands: {INTERVALS}")
    return finished(
        figure,
        f"Accuracy under {names} as the perturbation grows. {n} test images, bands are {INTERVALS}{_hull(table)}. "
        "A curve that stays high at a very large eps is a sign that the attack fails, not that the model holds."
        + (f" In grey, below the {len(shown)} most robust: {rest}." if rest else ""),
    )


def _at(rows: pd.DataFrame, eps: float | None) -> float:
    """Return the accuracy at the largest eps that is not above this one."""
    within = rows if eps is None else rows[rows["eps"] <= eps * (1 + 1e-6)]
    return float((within if len(within) else rows)["accuracy"].iloc[-1])


def best_epoch(metrics: pd.DataFrame) -> int | None:
    """Return the epoch whose weights training kept as best; None if there was no validation.

    Metrics without the column ``kept`` are read by the rule: the first of the highest (robust, clean) accuracy.
    """
    if "validation_robust" not in metrics or metrics["validation_robust"].isna().all():
        return None
    if "kept" in metrics:
        return int(metrics.loc[metrics["kept"].astype(bool), "epoch"].iloc[-1])
    scores = list(metrics[["validation_robust", "validation_clean"]].astype(float).fillna(-1).itertuples(index=False))
    return int(metrics["epoch"].iloc[scores.index(max(scores))])


@style()
def training_curves(table: pd.DataFrame) -> Figure:
    """Draw training, clean and robust validation accuracy against the epoch; the best epoch is marked.

    Args:
        table: metrics of one recipe: epoch, train_accuracy; where there was validation also validation_clean,
            validation_robust (shares) and validation_n; with several runs also seed.

    Raises:
        UnmovedError: a column is missing, or there is no row.
    """
    lines: dict[str, tuple[str, Look]] = {
        "train_accuracy": ("training, as trained on", {"color": INK, "linestyle": ":"}),
        "validation_clean": ("validation, clean", MEASURES[CLEAN] | {"marker": None}),
        "validation_robust": ("validation, under attack", MEASURES[WORST] | {"marker": None}),
    }
    require_columns(table, ["epoch", "train_accuracy"], "training_curves")
    figure = canvas(5.0, 3.4)
    axes = figure.add_subplot()
    runs = [rows for _, rows in table.groupby("seed")] if "seed" in table else [table]
    best = [best_epoch(rows) for rows in runs]
    for k, (rows, epoch) in enumerate(zip(runs, best, strict=True)):
        for name, (words, looks) in lines.items():
            if name in rows and rows[name].notna().any():
                alpha = 1.0 if len(runs) == 1 else 0.65
                axes.plot(
                    rows["epoch"], 100 * rows[name].astype(float), label="_" if k else words, alpha=alpha, **looks
                )
        if epoch is not None:
            height = 100 * rows.loc[rows["epoch"] == epoch, "validation_robust"].iloc[0]
            star: Look = {"color": INK, "marker": "*", "markersize": 10, "linestyle": "none", "zorder": 5}
            axes.axvline(epoch, **DOTTED)
            axes.plot([epoch], [height], label="_" if k else "best epoch", **star)
    axes.set_ylim(0, 102)
    axes.locator_params("x", integer=True)
    axes.set_xlabel("epoch")
    axes.set_ylabel("accuracy (%)")
    legend_above(figure, grow=False)
    marked = ", ".join(str(epoch) for epoch in best if epoch is not None)
    if not marked:
        figure.supxlabel("no validation")
        return finished(figure, "No image was held out for validation, so there is no best epoch.")
    n = count(table["validation_n"].dropna())
    figure.supxlabel(f"best epoch {marked}; validation on {n} images")
    return finished(
        figure, f"Best epoch by validation: {marked}. Validation on {n} images that no weight is trained on."
    )


@style()
def per_class(table: pd.DataFrame, classes: Sequence[str] = (), most: int = 30) -> Figure:
    """Draw clean and worst-case accuracy of each class (of the ``most`` least robust ones, where there are more).

    Args:
        table: class, measure, accuracy, low, high (shares), n: from `outcomes.per_class`.
        classes: names by class number; the numbers themselves where there is none.

    Raises:
        UnmovedError: a column is missing, or there is no row.
    """
    require_columns(table, ["class", "measure", "accuracy", "low", "high", "n"], "per_class")
    _require_measures(table, "per_class")
    robust = table[table["measure"] == WORST].set_index("class")["accuracy"]
    shown = sorted(robust.nsmallest(most).index)
    figure = canvas(5.0, 1.3 + 0.24 * len(shown))
    axes = figure.add_subplot()
    for (measure, looks), shift in zip(MEASURES.items(), (-0.13, 0.13), strict=True):
        rows = table[table["measure"] == measure].set_index("class").loc[shown]
        middle, low, high = (100 * rows[name].to_numpy() for name in ("accuracy", "low", "high"))
        places, ends = np.arange(len(shown)) + shift, bar(low, middle, high)
        axes.errorbar(middle, places, xerr=ends, label=measure, elinewidth=1, **looks | {"linestyle": "none"})
    axes.set_yticks(range(len(shown)), [_name(label, classes) for label in shown])
    axes.set_ylim(len(shown) - 0.5, -0.5)
    axes.set_xlim(-2, 102)
    axes.set_xlabel("accuracy (%)")
    axes.set_ylabel("class")
    legend_above(figure, grow=False)
    n, part = count(table["n"]), f", the {most} least robust of {len(robust)}" if len(robust) > most else ""
    figure.supxlabel(f"{n} test images per class{part}; bars: {INTERVALS}")
    return finished(
        figure,
        f"Clean and worst-case accuracy by class{part}; {n} test images per class, bars are {INTERVALS}{_hull(table)}.",
    )


@style()
def gallery(arrays: Mapping[str, np.ndarray], classes: Sequence[str] = (), rows: int = 5) -> Figure:
    """Draw the first ``rows`` images: clean, what the attack added (magnified; grey is no change), and their sum.

    Args:
        arrays: x and x_adv (M, C, H, W) in [0, 1]; label, clean_prediction, adversarial_prediction and attack (M,).
        classes: names by class number; the numbers themselves where there is none.

    Raises:
        UnmovedError: an array is missing, or they hold no image, or differ in length.
    """
    names = ("x", "x_adv", "label", "clean_prediction", "adversarial_prediction", "attack")
    lengths = {name: len(arrays[name]) if name in arrays else None for name in names}
    if len(set(lengths.values())) > 1 or not lengths["x"]:
        raise UnmovedError(f"gallery: expected arrays of one length >= 1, came {lengths}; evaluate the run again")
    number = min(rows, lengths["x"])
    x, x_adv = (np.asarray(arrays[name][:number], dtype=float) for name in ("x", "x_adv"))
    largest = float(np.abs(x_adv - x).max())
    magnified = max((m for m in (1, 2, 5, 10, 20, 50, 100, 200, 500) if m * largest <= 0.501), default=1)
    figure = canvas(4.6, 0.3 + 1.75 * number)
    grid = figure.subplots(number, 3, squeeze=False)
    for k in range(number):
        label, clean, adversarial = (int(arrays[name][k]) for name in names[2:5])
        seen = f"seen as {_name(adversarial, classes)}\n" + ("right" if adversarial == label else "wrong")
        words = f"label {_name(label, classes)}\nseen as {_name(clean, classes)}", str(arrays["attack"][k]), seen
        for axes, image, text in zip(
            grid[k], (x[k], 0.5 + magnified * (x_adv[k] - x[k]), x_adv[k]), words, strict=True
        ):
            picture = (image.transpose(1, 2, 0) if len(image) == 3 else image.mean(0)).clip(0, 1)
            axes.imshow(picture, cmap="gray", vmin=0, vmax=1, interpolation="none")
            axes.set(xticks=[], yticks=[])
            axes.set_xlabel(text, fontsize=9)
            axes.spines[:].set_visible(False)
            axes.grid(False)
    for axes, text in zip(grid[0], ("clean", f"perturbation x {magnified}", "adversarial"), strict=True):
        axes.set_title(text, fontsize=10)
    return finished(
        figure, f"{number} test images; the perturbation is magnified {magnified} times, grey is no change."
    )


def _name(label: int, classes: Sequence[str]) -> str:
    return str(classes[label]) if 0 <= label < len(classes) else str(label)


def _hull(table: pd.DataFrame) -> str:
    return HULL if "seeds" in table and table["seeds"].max() > 1 else ""


def _require_measures(table: pd.DataFrame, figure: str) -> None:
    missing = sorted(set(MEASURES) - set(table["measure"]))
    if missing:
        raise UnmovedError(f"{figure}: expected rows of the measures {list(MEASURES)}, came none of {missing}")
