"""Write the report of evaluated runs: one HTML page that opens offline, and its figures as SVG files beside it."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd
from matplotlib.figure import Figure

from unmoved.core.errors import UnmovedError
from unmoved.evaluation.doctor.finding import DO_NOT_BELIEVE, LOOK_CLOSER
from unmoved.evaluation.outcomes import CLEAN, WORST
from unmoved.reports import figures, pages
from unmoved.reports.drawing import MOST
from unmoved.reports.figures import breakdown
from unmoved.reports.pages import Section
from unmoved.reports.paired import beside
from unmoved.runs.by_recipe import RecipeResult, results_by_recipe

if TYPE_CHECKING:
    from unmoved.runs.folder import Run

TITLES = {
    "summary": "Summary",
    "results": "Results",
    "doctor": "Doctor",
    "broken": "What broke it",
    "tradeoff": "Trade-off",
    "curve": "Accuracy against eps",
    "training": "Training",
    "gallery": "Gallery",
    "classes": "Classes",
    "reading": "How to read this",
    "provenance": "Provenance",
}
WORDS = {
    "CLEAN": CLEAN,
    "MOST": MOST,
    "WORST": WORST,
    "DO_NOT_BELIEVE": DO_NOT_BELIEVE,
    "LOOK_CLOSER": LOOK_CLOSER,
}


def write(runs: Sequence[Run], path: Path, title: str, extra: Sequence[Section] = ()) -> Path:
    """Write the page to ``path`` and its figures to ``<stem>-figures/`` beside it; return ``path``.

    Raises:
        UnmovedError: see `by_recipe.results_by_recipe`; an extra section whose id is taken or is no anchor; a folder
            that cannot be written.
    """
    results, titles = results_by_recipe(runs), dict(TITLES)
    extra = (*_beside(results), *extra)
    for section in extra:
        if section.id in titles or not re.fullmatch(r"[a-z][a-z0-9-]*", section.id):
            taken = ", ".join(titles)
            raise UnmovedError(f"section id {section.id!r}: expected a-z, 0-9 and hyphens, and none of {taken}")
        titles[section.id] = section.title
    titles |= {name: titles.pop(name) for name in ("reading", "provenance")}  # these stay last
    if not any(result.is_trained for result in results):
        del titles["training"]
    drawn: dict[str, Sequence[tuple[str, Figure | Callable[[], Figure]]]] = {
        **_figures(results),
        **{section.id: [("", figure) for figure in section.figures] for section in extra},
    }
    facts = {"title": title, "titles": titles, "extra": extra, **WORDS, **_facts(results)}
    return pages.write(path, "report.html.jinja", facts, drawn)


def _beside(results: Sequence[RecipeResult]) -> list[Section]:
    """Make the section that compares recipes with the base that they name; none if there is no such recipe."""
    table = beside(results)
    text = (
        "In brackets the difference to the base method on the same images and seeds, in points, with a 95 % interval "
        "over images; helps and hurts are said only where every seed agrees. Robust is the worst case over the attacks "
        "of the evaluation, an upper bound; a method that gains under weak attacks alone has not gained.",
    )
    return [Section("beside", "Beside the base method", text, table)] if len(table) else []


def _figures(results: Sequence[RecipeResult]) -> dict[str, list[tuple[str, Callable[[], Figure]]]]:
    """Return by section what makes the figures, each with the recipe it belongs to ("" if it belongs to all)."""
    how, evaluation = results[0].runs[0].setting, results[0].runs[0].evaluation
    names = evaluation.get("classes", [])
    curves = [result.curve for result in results if result.curve is not None]
    return {
        "broken": [("", lambda: breakdown(pd.concat([result.broken for result in results])))],
        "tradeoff": [("", lambda: figures.tradeoff(pd.concat([result.by_seed for result in results])))],
        "curve": [("", lambda: figures.robustness_curve(pd.concat(curves), norm=how.norm, eps=how.eps))][: len(curves)],
        "training": [(v.name, partial(figures.training_curves, v.metrics)) for v in results if v.metrics is not None],
        "gallery": [(v.name, partial(figures.gallery, v.gallery, names, 4)) for v in results if v.gallery is not None],
        "classes": [(v.name, partial(figures.per_class, v.classes, names)) for v in results],
    }


def _facts(results: Sequence[RecipeResult]) -> dict[str, object]:
    """Collect what the text and tables of the page are made from."""
    first = results[0].runs[0]
    settled = [result for result in results if result.autoattack is not None]
    pool = sorted(settled or results, key=lambda result: -result.robust.accuracy)
    top = pool[0].robust
    lower = [result for result in pool if result.robust.accuracy < top.accuracy]
    bounded = [result for result in results if result not in pool]
    return {
        "results": results,
        "setting": first.setting,
        "attacks": [] if first.evaluation is first.verdict else list(first.setting.attacks),
        "settled": settled,
        "best": pool[: len(pool) - len(lower)],
        "second": lower[0] if lower else None,
        "rivals": [result for result in lower if result.robust.high >= top.low],
        "bounded": bounded,  # by other attacks alone, while AutoAttack has judged some recipe
        "open": [result for result in bounded if result.measures[WORST].accuracy >= top.accuracy],
        "cleanest": max(results, key=lambda result: result.measures[CLEAN].accuracy),
        "several_seeds": any(len(result.runs) > 1 for result in results),
        "stale": [line for result in results for run in result.runs for line in run.stale],
        "notes": _notes(results),
    }


def _notes(results: Sequence[RecipeResult]) -> list[str]:
    """List what attacks had to do otherwise than usual, and for which recipes, if not for all."""
    recipes: dict[str, list[str]] = {}
    for result in results:
        for run in result.runs:
            both = [("", run.evaluation), ("AutoAttack: ", run.verdict)]
            for who, facts in both[run.evaluation is run.verdict :]:
                for note in [] if facts is None else facts.get("notes", []):
                    names = recipes.setdefault(f"{who}{note}", [])
                    names += [] if result.name in names else [result.name]
    return [note if len(names) == len(results) else f"{_listed(names)}: {note}" for note, names in recipes.items()]


def _listed(names: Sequence[str]) -> str:
    """List names, at most `MOST` of them, and how many there are beside these."""
    return ", ".join(names[:MOST]) + (f" and {len(names) - MOST} more" if len(names) > MOST else "")
