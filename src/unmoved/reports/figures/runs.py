"""Draw accuracies, training curves and example images of runs; the same table always gives the same bytes.

Every figure carries its caption, with the n, as its label: ``figure.get_label()``. Intervals are drawn as the table
gives them: 95 % Wilson intervals of the n test images; for several seeds the hull of the seeds' intervals.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from unmoved.core.errors import UnmovedError, require_columns
from unmoved.evaluation.outcomes import CLEAN, WORST
from unmoved.reports.drawing import (
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
    leading,
    legend_above,
    looks,
    name_points,
    percent_limits,
    short_names,
    style,
)

# In a recipe's own colour: hollow and thin without an attack, filled and thick under it.
MEASURES: dict[str, Look] = {
    CLEAN: {"marker": "o", "linestyle": "-", "markerfacecolor": PAPER, "linewidth": 0.9},
    WORST: {"marker": "s", "linestyle": "--", "linewidth": 1.5},
}
AUTOATTACK, SAMPLED = "AutoAttack", "AutoAttack, sampled"
INTERVALS, HULL = "95 % Wilson intervals", " (with several seeds, from the lowest to the highest of theirs)"
DOTS: Look = {"markersize": 3.5, "linewidth": 0.8}
DOTTED: Look = {"color": INK, "linewidth": 0.9, "linestyle": (0, (2, 2)), "zorder": 1}


@style()
def tradeoff(table: pd.DataFrame, styles: Mapping[str, Look] | None = None, *, attacks: str = "") -> Figure:
    """Draw clean against worst-case accuracy: one marker and name per recipe, single seeds as faint points.

    Of more than `MOST` recipes some on the front have a name, then the most robust; the others are grey points.

    Args:
        table: recipe, seed, measure, accuracy, low, high (shares), n: `outcomes.summary` of each run, one below other.
            Rows of the measures ``"AutoAttack"`` and ``"AutoAttack, sampled"``, where there are any, become hollow
            markers, with a bar where one is sampled.
        styles: the looks of the recipes that are told apart; chosen here unless given.
        attacks: the name of what the worst case is over.

    Raises:
        UnmovedError: a column is missing, or there is no row.
    """
    require_columns(table, ["recipe", "seed", "measure", "accuracy", "low", "high", "n"], "tradeoff")
    _require_measures(table, "tradeoff")
    figure = canvas(5.0, 3.7)
    axes = figure.add_subplot()
    is_settled = table["measure"].isin([AUTOATTACK, SAMPLED])
    settled, table = table[is_settled], table[~is_settled]
    points, segments = [], list[Segment]()
    means = table.groupby(["recipe", "measure"], sort=False)["accuracy"].mean().unstack()
    places = {str(recipe): (means.loc[recipe, CLEAN], means.loc[recipe, WORST]) for recipe in means.index}
    recipes = list(places)
    styles, named = styles or looks(recipes, leading(places)), short_names(recipes)
    others = [recipe for recipe in recipes if recipe not in styles]
    grey = [(100 * places[recipe][0], 100 * places[recipe][1]) for recipe in others]
    rest = draw_others(axes, grey, "recipes", marker="o", linestyle="none")
    for recipe in (name for name in recipes if name in styles):
        point, lines = _draw_recipe(axes, table[table["recipe"] == recipe], named[recipe], styles[recipe])
        points.append((*point, named[recipe]))
        segments += lines
        if len(rows := settled[settled["recipe"] == recipe]):
            segments.append(_draw_settled(axes, point[0], rows, styles[recipe]))
    axes.margins(0.12)
    axes.set_xlabel("clean accuracy (%)")
    axes.set_ylabel(f"accuracy under {attacks} (%)" if attacks else "worst-case accuracy (%)")
    n = count(table["n"])
    with_bars = "; with a bar: sampled" if (settled["measure"] == SAMPLED).any() else ""
    hollow_words = f"hollow: {AUTOATTACK}, {count(settled['n'])}{with_bars}" if len(settled) else ""
    said = [f"{n} test images; bars: {INTERVALS}", hollow_words, f"grey: {rest}" if rest else ""]
    figure.supxlabel("\n".join(filter(None, said)))
    axes.set(xlim=percent_limits(*axes.get_xlim()), ylim=percent_limits(*axes.get_ylim()))
    name_points(figure, points, segments, others)
    several = f"{HULL}. Faint points are single seeds." if table["seed"].nunique() > 1 else "."
    return finished(
        figure,
        "Clean against worst-case accuracy: further up is more robust, further right is more accurate without an "
        f"attack. {n} test images, bars are {INTERVALS}{several}"
        + (f" Hollow markers: what {AUTOATTACK} leaves, {count(settled['n'])}{with_bars}." if len(settled) else "")
        + (f" Named are {len(points)}: along the front, then the most robust; grey: {rest}." if rest else ""),
    )


def _draw_settled(axes: Axes, x: float, rows: pd.DataFrame, look: Look) -> Segment:
    """Draw what AutoAttack leaves of a recipe, hollow, with the interval where one is sampled; return its bar."""
    low, middle, high = 100 * rows["low"].min(), 100 * rows["accuracy"].mean(), 100 * rows["high"].max()
    if not (rows["measure"] == SAMPLED).any():
        low = high = middle
    hollow: Look = {"markerfacecolor": PAPER, "markeredgecolor": look["color"], "zorder": 1.9}
    look = look | {"linestyle": "none", "markersize": 7} | hollow
    axes.errorbar(x, middle, yerr=bar([low], [middle], [high]) if low < high else None, elinewidth=1, **look)
    return (x, low), (x, high)


def _draw_recipe(axes: Axes, rows: pd.DataFrame, name: str, look: Look) -> tuple[tuple[float, float], list[Segment]]:
    """Draw a recipe's mean with its intervals, and its seeds; return the point and the ends of its error bars."""
    look = look | {"linestyle": "none"}
    x, y = (100 * rows[rows["measure"] == name].set_index("seed")[["accuracy", "low", "high"]] for name in MEASURES)
    if len(x) > 1:
        axes.plot(x["accuracy"], y["accuracy"].loc[x.index], alpha=0.35, markeredgewidth=0, **look)
    (left, middle, right), (down, centre, up) = (
        (z["low"].min(), z["accuracy"].mean(), z["high"].max()) for z in (x, y)
    )
    xerr, yerr = bar([left], [middle], [right]), bar([down], [centre], [up])
    look |= {"markersize": 9, "markeredgecolor": PAPER}
    axes.errorbar(middle, centre, xerr=xerr, yerr=yerr, label=name, elinewidth=1, **look)
    return (middle, centre), [((left, centre), (right, centre)), ((middle, down), (middle, up))]


@style()
def robustness_curve(
    table: pd.DataFrame, styles: Mapping[str, Look] | None = None, *, norm: str = "", eps: float | None = None
) -> Figure:
    """Draw accuracy against eps, one line with its band per recipe (and attack, where there are several).

    Of more than `MOST` lines those of the highest accuracy at ``eps`` are told apart, and the others are grey.

    Args:
        table: recipe, attack, eps, accuracy, low, high (shares), n: from `outcomes.curve_summary`.
        styles: the looks of the recipes that are told apart; chosen here unless given. A second attack is dotted.
        norm: the norm in which eps is measured, for the axis.
        eps: the eps of the verdict, marked by a line.

    Raises:
        UnmovedError: a column is missing, or there is no row.
    """
    require_columns(table, ["recipe", "attack", "eps", "accuracy", "low", "high", "n"], "robustness_curve")
    groups = table.groupby(["recipe", "attack"], sort=False)
    lines = {(str(recipe), str(attack)): rows.sort_values("eps") for (recipe, attack), rows in groups}
    attacks = [str(name) for name in table["attack"].unique()]
    if styles is None:
        leaders, _ = foremost(list(lines), lambda keys: -_at(lines[keys], eps))
        styles = looks([recipe for recipe, _ in lines], [recipe for recipe, _ in leaders])
    named = short_names([recipe for recipe, _ in lines])
    shown, others = ([keys for keys in lines if (keys[0] in styles) is told] for told in (True, False))
    figure = canvas(5.0, 3.3 + 0.1 * (len(shown) + bool(others)))
    axes = figure.add_subplot()
    rest = draw_others(axes, [(lines[keys]["eps"], 100 * lines[keys]["accuracy"]) for keys in others], "lines")
    for keys in shown:
        rows, ours = lines[keys], styles[keys[0]] | ({} if keys[1] == attacks[0] else {"linestyle": ":"})
        name = named[keys[0]] + (f" ({keys[1]})" if len(attacks) > 1 else "")
        low, middle, high = (100 * rows[end] for end in ("low", "accuracy", "high"))
        axes.fill_between(rows["eps"], low, high, color=ours["color"], alpha=0.12, linewidth=0)
        axes.plot(rows["eps"], middle, label=name, **ours)
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


@style(small=True)
def training_curves(table: pd.DataFrame, color: str = INK) -> Figure:
    """Draw training, clean and robust validation accuracy against the epoch; the best epoch is marked.

    Args:
        table: metrics of one recipe: epoch, train_accuracy; where there was validation also validation_clean,
            validation_robust (shares) and validation_n; with several runs also seed.
        color: the recipe's.

    Raises:
        UnmovedError: a column is missing, or there is no row.
    """
    own: Look = {"color": color, "marker": None}
    lines: dict[str, tuple[str, Look]] = {
        "train_accuracy": ("training", {"color": INK, "linestyle": ":"}),
        "validation_clean": ("validation, clean", MEASURES[CLEAN] | own),
        "validation_robust": ("validation, attacked", MEASURES[WORST] | own),
    }
    require_columns(table, ["epoch", "train_accuracy"], "training_curves")
    figure = canvas(2.7, 2.2)
    axes = figure.add_subplot()
    runs = [rows for _, rows in table.groupby("seed")] if "seed" in table else [table]
    best = [best_epoch(rows) for rows in runs]
    for k, (rows, epoch) in enumerate(zip(runs, best, strict=True)):
        for name, (words, ours) in lines.items():
            if name in rows and rows[name].notna().any():
                alpha = 1.0 if len(runs) == 1 else 0.65
                axes.plot(rows["epoch"], 100 * rows[name].astype(float), label="_" if k else words, alpha=alpha, **ours)
        if epoch is not None:
            height = 100 * rows.loc[rows["epoch"] == epoch, "validation_robust"].iloc[0]
            star: Look = {"color": INK, "marker": "*", "markersize": 7, "linestyle": "none", "zorder": 5}
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


@style(small=True)
def per_class(table: pd.DataFrame, classes: Sequence[str] = (), color: str = INK, *, most: int = 30) -> Figure:
    """Draw clean and worst-case accuracy of each class (of the ``most`` least robust ones, where there are more).

    Args:
        table: class, measure, accuracy, low, high (shares), n: from `outcomes.per_class`.
        classes: names by class number; the numbers themselves where there is none.
        color: the recipe's.

    Raises:
        UnmovedError: a column is missing, or there is no row.
    """
    require_columns(table, ["class", "measure", "accuracy", "low", "high", "n"], "per_class")
    _require_measures(table, "per_class")
    robust = table[table["measure"] == WORST].set_index("class")["accuracy"]
    shown = sorted(robust.nsmallest(most).index)
    figure = canvas(2.7, 0.95 + 0.19 * len(shown))
    axes = figure.add_subplot()
    for (measure, ours), shift in zip(MEASURES.items(), (-0.13, 0.13), strict=True):
        rows = table[table["measure"] == measure].set_index("class").loc[shown]
        middle, low, high = (100 * rows[name].to_numpy() for name in ("accuracy", "low", "high"))
        places, ends = np.arange(len(shown)) + shift, bar(low, middle, high)
        axes.errorbar(middle, places, xerr=ends, label=measure, **ours | {"linestyle": "none", "color": color, **DOTS})
    axes.set_yticks(range(len(shown)), [_name(label, classes) for label in shown])
    axes.set_ylim(len(shown) - 0.5, -0.5)
    axes.set_xlim(-2, 102)
    axes.set_xlabel("accuracy (%)")
    axes.set_ylabel("class")
    legend_above(figure, grow=False)
    n, part = count(table["n"]), f", the {most} least robust of {len(robust)}" if len(robust) > most else ""
    figure.supxlabel(f"{n} test images per class{part}\nbars: {INTERVALS}")
    return finished(
        figure,
        f"Clean and worst-case accuracy by class{part}; {n} test images per class, bars are {INTERVALS}{_hull(table)}.",
    )


def successes(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return the images of a gallery that were right as they are and wrong after the attack."""
    label = arrays["label"]
    broken = (arrays["clean_prediction"] == label) & (arrays["adversarial_prediction"] != label)
    return {name: values[broken] for name, values in arrays.items()}


@style(small=True)
def gallery(arrays: Mapping[str, np.ndarray], classes: Sequence[str] = (), most: int = 4) -> Figure:
    """Draw the first ``most`` images as columns: clean, what the attack added (magnified; grey is none), their sum.

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
    number = min(most, lengths["x"])
    attacks = list(dict.fromkeys(map(str, arrays["attack"][:number])))
    x, x_adv = (np.asarray(arrays[name][:number], dtype=float) for name in ("x", "x_adv"))
    largest = float(np.abs(x_adv - x).max())
    magnified = max((m for m in (1, 2, 5, 10, 20, 50, 100, 200, 500) if m * largest <= 0.501), default=1)
    figure = canvas(2.9, 2.75)
    grid = figure.subplots(3, most, squeeze=False)
    for axes in grid.flat:
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_visible(False)
        axes.grid(False)
    for k in range(number):
        label, clean, adversarial = (_name(int(arrays[name][k]), classes) for name in names[2:5])
        images = x[k], 0.5 + magnified * (x_adv[k] - x[k]), x_adv[k]
        seen = clean if clean == label else f"{clean} (is {label})"
        by = str(arrays["attack"][k]) if len(attacks) > 1 else ""
        for axes, image, text in zip(grid[:, k], images, (seen, by, adversarial), strict=True):
            picture = (image.transpose(1, 2, 0) if len(image) == 3 else image.mean(0)).clip(0, 1)
            axes.imshow(picture, cmap="gray", vmin=0, vmax=1, interpolation="none")
            axes.set_xlabel("\n".join(textwrap.wrap(text, 11)[:3]), labelpad=2)
    for axes, text in zip(grid[:, 0], ("clean", f"attack x {magnified}", "attacked"), strict=True):
        axes.set_ylabel(text)
    return finished(
        figure,
        f"{number} test images, with what the model sees in them before and after the attack ({', '.join(attacks)}); "
        f"what the attack adds is magnified {magnified} times, grey is no change.",
    )


def _name(label: int, classes: Sequence[str]) -> str:
    return str(classes[label]) if 0 <= label < len(classes) else str(label)


def _hull(table: pd.DataFrame) -> str:
    return HULL if "seeds" in table and table["seeds"].max() > 1 else ""


def _require_measures(table: pd.DataFrame, figure: str) -> None:
    missing = sorted(set(MEASURES) - set(table["measure"]))
    if missing:
        raise UnmovedError(f"{figure}: expected rows of the measures {list(MEASURES)}, came none of {missing}")
