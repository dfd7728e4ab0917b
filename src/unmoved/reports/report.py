"""Write the report of evaluated runs: one HTML page that opens offline, and its figures as SVG files beside it."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import pandas as pd
from markupsafe import Markup
from matplotlib.figure import Figure

from unmoved.core.errors import UnmovedError
from unmoved.evaluation.doctor.finding import DO_NOT_BELIEVE, GRADES, LOOK_CLOSER
from unmoved.evaluation.outcomes import CLEAN, WORST
from unmoved.reports import figures, pages
from unmoved.reports.drawing import INK, MOST, Look, key, leading, looks
from unmoved.reports.figures import breakdown
from unmoved.reports.next_steps import next_steps
from unmoved.reports.pages import Section
from unmoved.reports.paired import beside
from unmoved.runs.by_recipe import LostClass, RecipeResult, results_by_recipe
from unmoved.runs.evaluated import EvaluationSetting

if TYPE_CHECKING:
    from unmoved.runs.folder import Run

# The sections in order; all but the summary are folded.
TITLES = {
    "summary": "Summary",
    "results": "All figures",
    "doctor": "Doctor",
    "beside": "Beside the base method",
    "broken": "What broke it",
    "tradeoff": "Trade-off",
    "curve": "Accuracy against eps",
    "classes": "Classes",
    "training": "Training",
    "gallery": "Gallery",
    "reading": "How to read this",
    "provenance": "Provenance",
}
OBJECTED = "Not to be believed, says the doctor"
WORDS = {
    "CLEAN": CLEAN,
    "MOST": MOST,
    "WORST": WORST,
    "DO_NOT_BELIEVE": DO_NOT_BELIEVE,
    "LOOK_CLOSER": LOOK_CLOSER,
    "OBJECTED": OBJECTED,
}


def write(runs: Sequence[Run], path: Path, title: str, extra: Sequence[Section] = ()) -> Path:
    """Write the page to ``path`` and its figures to ``<stem>-figures/`` beside it; return ``path``.

    Raises:
        UnmovedError: see `by_recipe.results_by_recipe`; an extra section whose id is taken or is no anchor; a folder
            that cannot be written.
    """
    results, titles = results_by_recipe(runs), dict(TITLES)
    for section in extra:
        if section.id in titles or not re.fullmatch(r"[a-z][a-z0-9-]*", section.id):
            taken = ", ".join(titles)
            raise UnmovedError(f"section id {section.id!r}: expected a-z, 0-9 and hyphens, and none of {taken}")
    titles |= {section.id: section.title for section in extra}
    if not any(result.is_trained for result in results):
        del titles["training"]
    points = {v.name: (v.measures[CLEAN].accuracy, v.measures[WORST].accuracy) for v in results}
    styles = looks(list(points), leading(points))
    drawn: dict[str, Sequence[tuple[str, Figure | Callable[[], Figure]]]] = {
        **_figures(results, styles),
        **{section.id: [("", figure) for figure in section.figures] for section in extra},
    }
    facts = {"title": title, "titles": titles, "extra": extra, **WORDS, **_facts(results, extra)}
    facts["keys"] = {name: Markup(key(styles.get(name, {}))) for name in points}
    return pages.write(path, "report.html.jinja", facts, drawn)


def _beside(results: Sequence[RecipeResult]) -> Section | None:
    """Make the section that compares recipes with the base that they name; None if there is no such recipe."""
    table = beside(results)
    text: tuple[str, ...] = (
        "In brackets the difference to the base method on the same images and seeds, in points, with a 95 % interval "
        "over images; helps and hurts are said only where every seed agrees. Robust is the worst case over the attacks "
        "of the evaluation, an upper bound; a method that gains under weak attacks alone has not gained.",
    )
    if any(result.sampled for result in results):
        text += (
            "A sampled verdict does not say which images AutoAttack leaves, so that there is no difference on the same "
            "images: both figures stand with their own 95 % intervals, those of all images like these.",
        )
    return Section("beside", TITLES["beside"], text, table) if len(table) else None


def _figures(
    results: Sequence[RecipeResult], styles: Mapping[str, Look]
) -> dict[str, list[tuple[str, Callable[[], Figure]]]]:
    """Return by section the functions that draw figures, each with its recipe ("" if it is about all)."""
    how, evaluation = results[0].runs[0].setting, results[0].runs[0].evaluation
    names = evaluation.get("classes", [])
    curves = [result.curve for result in results if result.curve is not None]
    colours = {result.name: str(styles.get(result.name, {}).get("color", INK)) for result in results}
    ranked = [result for group in ranking(results) for result in group.results]
    galleries = {v.name: figures.successes(v.gallery) for v in ranked if v.gallery is not None}
    return {
        "broken": [("", lambda: breakdown(pd.concat([result.broken for result in ranked]), styles))],
        "tradeoff": [
            ("", lambda: figures.tradeoff(_by_seed(results), styles, attacks=_against(results))),
        ][: len(results) - 1],  # a single point shows nothing
        "curve": [("", partial(_curve, curves, styles, how))] if curves else [],
        "training": [
            (v.name, partial(figures.training_curves, v.metrics, colours[v.name]))
            for v in ranked
            if v.metrics is not None
        ],
        "gallery": [
            (name, partial(figures.gallery, some, names)) for name, some in galleries.items() if len(some["x"])
        ],
        "classes": [(v.name, partial(figures.per_class, v.classes, names, colours[v.name])) for v in ranked],
    }


def _curve(curves: Sequence[pd.DataFrame], styles: Mapping[str, Look], how: EvaluationSetting) -> Figure:
    return figures.robustness_curve(pd.concat(curves), styles, norm=how.norm, eps=how.eps)


def _by_seed(results: Sequence[RecipeResult]) -> pd.DataFrame:
    """Concatenate the accuracies of all runs, with those under AutoAttack beside other attacks'."""
    tables = [result.by_seed for result in results]
    for result in results:
        if any(run.evaluation is not run.verdict for run in result.settled):
            sampled = {run.seed for run in result.sampled}
            rows = [
                row._asdict() | {"seed": seed, "measure": figures.SAMPLED if seed in sampled else figures.AUTOATTACK}
                for seed, row in result.autoattack_by_seed.items()
            ]
            tables.append(pd.DataFrame(rows).assign(recipe=result.name))
    return pd.concat(tables)


def _against(results: Sequence[RecipeResult]) -> str:
    attacks = results[0].runs[0].setting.attacks
    if len(attacks) > 1:
        return f"{len(attacks)} attacks"
    return "AutoAttack" if attacks[0] == "autoattack" else attacks[0]


class Group(NamedTuple):
    """Hold recipes that are ranked among themselves, the best first, and why not with others."""

    title: str
    results: list[RecipeResult]


def ranking(results: Sequence[RecipeResult]) -> list[Group]:
    """Rank recipes, the best first, and what is not comparable apart.

    The groups: recipes that AutoAttack has judged; recipes that only other attacks have judged, whose upper bounds are
    looser; and recipes whose figures the doctor does not believe.
    """
    ranked = sorted(results, key=lambda result: -result.robust.accuracy)
    objected = [result for result in ranked if result.doctor_summary.grade == DO_NOT_BELIEVE]
    sound = [result for result in ranked if result not in objected]
    settled = [result for result in sound if result.autoattack is not None]
    looser = [result for result in sound if result.autoattack is None]
    judged = f"Judged by {', '.join(results[0].runs[0].setting.attacks)}"
    groups = (
        Group(f"Judged by AutoAttack{_sampled(settled)}", settled),
        Group(f"{judged} alone: looser upper bounds, not to be ranked with those above" if settled else judged, looser),
        Group(OBJECTED, objected),
    )
    return [group for group in groups if group.results]


class Standing(NamedTuple):
    """Hold which recipe is best, and how certain that is.

    Attributes:
        best: the first of the ranking; several if equal.
        second: the next of those that compare with it.
        rivals: those whose interval overlaps with that of the best.
        bounded: those that other attacks alone have judged, where the best is AutoAttack's.
        open: those of them whose upper bound is no lower than what AutoAttack leaves of the best.
    """

    best: list[RecipeResult]
    second: RecipeResult | None
    rivals: list[RecipeResult]
    bounded: list[RecipeResult]
    open: list[RecipeResult]

    @classmethod
    def of(cls, groups: Sequence[Group]) -> Standing:
        """Read it off the ranking; where the doctor objects to all, AutoAttack's still come first."""
        pool = [v for v in groups[0].results if v.autoattack is not None] or groups[0].results
        top = pool[0].robust
        lower = [v for v in pool if v.robust.accuracy < top.accuracy]
        sound = [v for group in groups for v in group.results if group is groups[0] or group.title != OBJECTED]
        bounded = [v for v in sound if v.autoattack is None] if pool[0].autoattack is not None else []
        return cls(
            pool[: len(pool) - len(lower)],
            lower[0] if lower else None,
            [v for v in lower if v.robust.high >= top.low],
            bounded,
            [v for v in bounded if v.measures[WORST].accuracy >= top.accuracy],
        )


def _facts(results: Sequence[RecipeResult], extra: Sequence[Section]) -> dict[str, object]:
    """Collect what the text and tables of the page are made from."""
    first, groups = results[0].runs[0], ranking(results)
    standing, ranked = Standing.of(groups), [result for group in groups for result in group.results]
    contenders = [*standing.best, *standing.rivals, *standing.open]
    return {
        **standing._asdict(),
        "results": ranked,
        "groups": groups,
        "setting": first.setting,
        "attacks": [] if first.evaluation is first.verdict else list(first.setting.attacks),
        "class_names": first.evaluation.get("classes", []),
        "settled": [result for result in results if result.autoattack is not None],
        "sampled": [run for result in ranked for run in result.sampled],
        "how_many_sampled": _sampled(results),
        "several_seeds": any(len(result.runs) > 1 for result in results),
        "stale": [line for result in results for run in result.runs for line in run.stale],
        "notes": _notes(results),
        "unbroken": [v.name for v in ranked if v.gallery is not None and not len(figures.successes(v.gallery)["x"])],
        "beside": _beside(results),
        "told": _told(ranked),
        "quiet": [v for v in ranked if not v.doctor_summary.said and not v.doctor_summary.unseen],
        "unseen": [v for v in ranked if v.doctor_summary.unseen],
        "lost": _lost(ranked),
        "steps": next_steps(ranked, contenders, analysed=bool(extra)),
    }


def _told(results: Sequence[RecipeResult]) -> list[tuple[str, str, list[tuple[RecipeResult, list[int]]]]]:
    """List what the doctor says, the gravest first: (grade, sentence, of which recipes at which seeds)."""
    told: dict[tuple[str, str], list[tuple[RecipeResult, list[int]]]] = {}
    for result in results:
        for sentence, seeds in result.doctor_summary.said:
            told.setdefault((result.doctor_summary.grade, sentence), []).append((result, seeds))
    return [(*key, told[key]) for key in sorted(told, key=lambda key: GRADES.index(key[0]))]


def _lost(results: Sequence[RecipeResult]) -> list[tuple[bool, int, list[tuple[RecipeResult, LostClass]]]]:
    """List the classes that models have lost: (clean or under attack, class, by which recipes), clean ones first."""
    lost: dict[tuple[bool, int], list[tuple[RecipeResult, LostClass]]] = {}
    for result in results:
        for one in result.lost_classes:
            lost.setdefault((one.clean, one.label), []).append((result, one))
    return [(*key, lost[key]) for key in sorted(lost, key=lambda key: (not key[0], key[1]))]


def _sampled(results: Sequence[RecipeResult]) -> str:
    """Say how many of AutoAttack's verdicts are sampled."""
    is_sampled = [run.estimate is not None for result in results for run in result.settled]
    return "" if not any(is_sampled) else ", sampled" if all(is_sampled) else ", some of them by a sample"


def _notes(results: Sequence[RecipeResult]) -> list[str]:
    """List how attacks were adapted, and for which recipes, if not for all."""
    recipes: dict[str, list[str]] = {}
    for result in results:
        for run in result.runs:
            settled = run.sampled or run.verdict
            both = [("", run.evaluation), ("AutoAttack, sampled: " if run.sampled else "AutoAttack: ", settled)]
            for who, facts in both[run.evaluation is settled :]:
                for note in [] if facts is None else facts.get("notes", []):
                    names = recipes.setdefault(f"{who}{note}", [])
                    names += [] if result.name in names else [result.name]
    return [note if len(names) == len(results) else f"{_listed(names)}: {note}" for note, names in recipes.items()]


def _listed(names: Sequence[str]) -> str:
    """List at most `MOST` names, and the number of the others."""
    return ", ".join(names[:MOST]) + (f" and {len(names) - MOST} more" if len(names) > MOST else "")
