"""Draw for each recipe which share of the images each part of an attack broke, and which share is robust."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping

import pandas as pd
from matplotlib.figure import Figure

from unmoved.core.errors import require_columns
from unmoved.evaluation.outcomes import CLEAN, ROBUST
from unmoved.reports.drawing import INK, PAPER, Fill, Look, canvas, count, finished, short_names, style

HATCHES = ("////", "....", "\\\\\\\\", "xxxx", "----", "++++", "oooo")
WORDS = {CLEAN: "misclassified as it is", ROBUST: "still robust (the recipe's colour)"}
LOOKS: dict[str, Fill] = {
    CLEAN: {"facecolor": INK, "edgecolor": INK},
    ROBUST: {"facecolor": PAPER, "edgecolor": INK},
}
LEAST = 6.0  # percent: no number fits into a smaller piece


@style()
def breakdown(table: pd.DataFrame, styles: Mapping[str, Look] | None = None) -> Figure:
    """Draw one bar per recipe: images misclassified as they are, broken by each part in turn, robust.

    What broke is hatched; what is robust has the recipe's colour.

    Args:
        table: recipe, source (who attacked), by, place (a number, ascending in the order of attacks), share, n: from
            `RecipeResult.broken`, one below the other.
        styles: the looks of the recipes.

    Raises:
        UnmovedError: a column is missing, or there is no row.
    """
    require_columns(table, ["recipe", "source", "by", "place", "share", "n"], "breakdown")
    parts = list(table.groupby("by")["place"].min().sort_values(kind="stable").index)
    attacks = [part for part in parts if part not in WORDS]
    recipes = list(dict.fromkeys(table["recipe"]))
    rows = 100 * table.pivot(index="recipe", columns="by", values="share").fillna(0).loc[recipes, parts]
    heads = _heads(table, short_names(recipes))
    tallest = max(map(len, heads))
    pitch, lines = 0.5 + 0.19 * tallest, -(-len(parts) // 2)  # inches
    figure = canvas(5.0, 0.95 + 0.2 * lines + pitch * len(rows))
    axes = figure.add_subplot()
    thick = 0.32 / pitch
    left = pd.Series(0.0, index=rows.index)
    for part in parts:
        k = attacks.index(part) if part in attacks else 0
        hatched: Fill = {"facecolor": PAPER, "edgecolor": INK, "hatch": HATCHES[k % len(HATCHES)]}
        fill = LOOKS.get(part, hatched)
        label = WORDS.get(part, f"broken by {part}")
        bars = axes.barh(range(len(rows)), rows[part], thick, left, label=label, linewidth=0.8, **fill)
        for bar, recipe in zip(bars, recipes, strict=True):
            if part == ROBUST and styles is not None and recipe in styles:
                bar.set(facecolor=styles[recipe]["color"])
        for place, (start, width) in enumerate(zip(left, rows[part], strict=True)):
            if width >= LEAST:
                box = {"facecolor": PAPER, "linewidth": 0, "pad": 1.2}
                axes.text(start + width / 2, place, f"{width:.1f}", ha="center", va="center", fontsize=8.5, bbox=box)
        left += rows[part]
    for place, head in enumerate(heads):
        axes.text(0, place - thick / 2 - 0.04 / pitch, "\n".join(head), ha="left", va="bottom", fontsize=9)
    axes.set_yticks([])
    axes.set_xlim(0, 100)
    axes.set_ylim(len(rows) - 1 + thick, thick - 1)
    axes.set_xlabel("share of the test images (%)")
    axes.set_ylabel("recipe")
    axes.grid(visible=False)
    axes.spines["left"].set_visible(False)
    handles, names = axes.get_legend_handles_labels()
    figure.legend(handles, names, loc="outside upper center", ncols=2, handleheight=1.1)
    n = count(table["n"])
    figure.supxlabel(f"{n} test images")
    return finished(
        figure,
        f"What became of the test images ({n}), from left to right in the order in which the attacks ran: an image "
        "counts for the first that broke it, so a small share does not mean a weak attack. Pieces "
        f"without a number are smaller than {LEAST:.0f} %; over several seeds, means.",
    )


def _heads(table: pd.DataFrame, names: Mapping[str, str]) -> list[list[str]]:
    """Return the lines above each bar: the recipe, who attacked it, and n."""
    return [
        textwrap.wrap(f"{names[str(recipe)]} ({rows['source'].iloc[0]}, {count(rows['n'])})", 52)
        for recipe, rows in table.groupby("recipe", sort=False)
    ]
