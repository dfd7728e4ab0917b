"""Group evaluated runs by recipe, seeds together, after checking that all were evaluated alike.

Accuracies are only comparable on the same data, in the same ball, under the same attacks; `results_by_recipe` refuses
anything else. Results of AutoAttack and the doctor are added if they are about the same weights.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pandas as pd

from unmoved.core.errors import UnmovedError
from unmoved.core.untrusted import Json
from unmoved.evaluation import outcomes
from unmoved.evaluation.doctor import lost_classes
from unmoved.evaluation.doctor.finding import DO_NOT_BELIEVE, GRADES, LOOK_CLOSER, Finding, summary
from unmoved.evaluation.outcomes import CLEAN, WORST
from unmoved.runs import accuracy
from unmoved.runs.accuracy import Measure
from unmoved.runs.evaluated import EvaluatedRun, EvaluationSetting, on_replaced_data, require_same_samples

if TYPE_CHECKING:
    from unmoved.runs.folder import Run


class SharedFinding(NamedTuple):
    """A finding of the doctor at some seeds of a recipe, with the measurement at each: (seed, text)."""

    grade: str
    check: str
    why: str
    do: str
    measured: list[tuple[int, str]]


class LostClass(NamedTuple):
    """A class that a recipe's models have lost.

    Attributes:
        clean: lost on clean images; otherwise under attack, counting samples that are right clean.
        hits: (seed, number right or robust, number in all) at each seed that lost it.
    """

    clean: bool
    label: int
    hits: list[tuple[int, int, int]]


class DoctorSummary(NamedTuple):
    """Hold what the doctor found in the runs of a recipe.

    Attributes:
        grade: the gravest over the seeds; "" without findings, or if the doctor was not run.
        said: the sentences to print beside the number, each with its seeds.
        findings: every finding, the gravest first.
        unseen: the runs on which the doctor was not run.
    """

    grade: str
    said: list[tuple[str, list[int]]]
    findings: list[SharedFinding]
    unseen: list[EvaluatedRun]


@dataclass(frozen=True, eq=False)
class RecipeResult:
    """Hold the evaluated runs of one recipe, one per seed, and summarise them."""

    name: str
    runs: tuple[EvaluatedRun, ...]

    @cached_property
    def measures(self) -> dict[str, Measure]:
        """Return the accuracy by measure: "clean", each attack, "worst case"."""
        return {row.measure: row for row in accuracy.rows_of([run.outcomes for run in self.runs])}

    @cached_property
    def settled(self) -> tuple[EvaluatedRun, ...]:
        """Return the runs that AutoAttack has judged, completely or by a sample."""
        return tuple(run for run in self.runs if run.autoattack is not None or run.estimate is not None)

    @property
    def sampled(self) -> tuple[EvaluatedRun, ...]:
        """Return those of `settled` that AutoAttack has judged on a sample."""
        return tuple(run for run in self.settled if run.estimate is not None)

    @property
    def judge(self) -> str:
        """Return the name of AutoAttack's figure, which says whether it is sampled."""
        if len(self.sampled) == len(self.settled):
            return "AutoAttack, sampled" if self.sampled else "AutoAttack"
        seeds = ", ".join(str(run.seed) for run in self.sampled)
        return f"AutoAttack, sampled at seed{'s' * (len(self.sampled) > 1)} {seeds}" if seeds else "AutoAttack"

    @cached_property
    def autoattack_by_seed(self) -> dict[int, Measure]:
        """Return the accuracy under AutoAttack of each seed that it judged; a sampled one as `of_estimate`."""
        judged: dict[int, Measure] = {}
        for run in self.settled:
            if run.estimate is not None:
                judged[run.seed] = accuracy.of_estimate(run.estimate, run.setting.eps)
            elif run.autoattack is not None:
                judged[run.seed] = accuracy.rows_of([run.autoattack], accuracy.worst)[0]
        return judged

    @cached_property
    def autoattack(self) -> Measure | None:
        """Return the accuracy under AutoAttack over the seeds; None if it has judged no seed."""
        return accuracy.across(list(self.autoattack_by_seed.values())) if self.settled else None

    @property
    def versions(self) -> str:
        """Return which versions of AutoAttack judged, other than the standard one: ``"rand"``."""
        names = {str(name) for run in self.runs if run.autoattack is not None for name in run.autoattack["attack"]}
        names |= {"autoattack" for _ in self.sampled}
        return "" if names <= {"autoattack"} else ", ".join(n.partition("-")[2] or "standard" for n in sorted(names))

    @property
    def robust(self) -> Measure:
        """Return AutoAttack's row if there is one, otherwise that of the worst case."""
        return self.autoattack or self.measures[WORST]

    @cached_property
    def broken(self) -> pd.DataFrame:
        """Average `EvaluatedRun.broken` over the seeds that AutoAttack judged: recipe, source, by, place, share, n.

        Over all seeds if AutoAttack judged none completely: a sampled verdict does not say which images it breaks.
        """
        complete = tuple(run for run in self.runs if run.autoattack is not None)
        runs = complete or self.runs
        tables = pd.concat([run.broken for run in runs])
        shares = tables.groupby("by").agg(place=("place", "min"), share=("share", "sum")).reset_index()
        shares["share"] /= len(runs)
        source = ", ".join(name for name in self.measures if name not in (CLEAN, WORST))
        if complete:
            source = "AutoAttack" + (f" {self.versions}" if self.versions else "")
        n = self.robust.n if complete else self.measures[WORST].n
        return shares.sort_values("place").assign(recipe=self.name, source=source, n=n)

    @cached_property
    def doctor_summary(self) -> DoctorSummary:
        """Merge the doctor's findings of all seeds; the same finding at several seeds is listed once."""
        shared: dict[tuple[str, ...], SharedFinding] = {}
        by_grade: dict[str, dict[str, list[int]]] = {grade: {} for grade in GRADES}
        for run in self.runs:
            if run.doctor is None or not run.doctor["findings"]:
                continue
            findings = [
                Finding(f["check"], f["grade"], f["measured"], f["why"], f["do"]) for f in run.doctor["findings"]
            ]
            for finding in findings:
                key = (finding.grade, finding.check, finding.why, finding.do)
                shared.setdefault(key, SharedFinding(*key, [])).measured.append((run.seed, finding.measured))
            grade = min((finding.grade for finding in findings), key=GRADES.index)
            sentence = run.doctor.get("sentence") or summary(findings)
            by_grade[grade].setdefault(sentence, []).append(run.seed)
        grade = next((grade for grade in GRADES if by_grade[grade]), "")
        said = list(by_grade[grade].items()) if grade in (DO_NOT_BELIEVE, LOOK_CLOSER) else []
        ordered = sorted(shared.values(), key=lambda finding: GRADES.index(finding.grade))
        return DoctorSummary(grade, said, ordered, [run for run in self.runs if run.doctor is None])

    @cached_property
    def lost_classes(self) -> list[LostClass]:
        """Return the classes that the doctor's rule calls lost, of all images of the evaluation; clean ones first.

        The doctor itself uses AutoAttack's images only, if there are any, which may be too few to tell.
        """
        lost: dict[tuple[bool, int], LostClass] = {}
        for run in self.runs:
            samples = outcomes.by_sample(run.outcomes, is_checked=True)
            label, right, robust = (samples[name].to_numpy() for name in ("label", CLEAN, WORST))
            clean = lost_classes.lost_clean(label, right)
            known = {one.label for one in clean}
            attacked = [one for one in lost_classes.lost_under_attack(label, right, robust) if one.label not in known]
            for is_clean, found in ((True, clean), (False, attacked)):
                for one in found:
                    entry = lost.setdefault((is_clean, one.label), LostClass(is_clean, one.label, []))
                    entry.hits.append((run.seed, one.hits, one.n))
        return [lost[key] for key in sorted(lost, key=lambda key: (not key[0], key[1]))]

    @property
    def description(self) -> str:
        """Return the recipe's own description, or else the names of its parts; with line breaks."""
        recipe = self.runs[0].recipe
        return str(recipe.get("description") or _parts_of(recipe))

    @cached_property
    def by_seed(self) -> pd.DataFrame:
        """Return `outcomes.summary` of each run, with columns recipe and seed."""
        rows = [accuracy.summary(run.outcomes).assign(recipe=self.name, seed=run.seed) for run in self.runs]
        return pd.concat(rows, ignore_index=True)

    @cached_property
    def classes(self) -> pd.DataFrame:
        """Return `outcomes.per_class` across the seeds."""
        return self._across(accuracy.per_class)

    @cached_property
    def curve(self) -> pd.DataFrame | None:
        """Return `outcomes.curve_summary` across the seeds that have a curve; None if none has."""
        tables = [run.curve for run in self.runs if run.curve is not None]
        if not tables:
            return None
        return outcomes.across_seeds(tables, accuracy.curve_summary).assign(recipe=self.name)

    @cached_property
    def metrics(self) -> pd.DataFrame | None:
        """Return what training logged, with a column seed; None if nothing was trained here."""
        tables = [run.metrics.assign(seed=run.seed) for run in self.runs if len(run.metrics)]
        return pd.concat(tables, ignore_index=True) if tables else None

    @property
    def gallery(self) -> dict[str, np.ndarray] | None:
        """Return the gallery of the first seed that has one."""
        return next((run.gallery for run in self.runs if run.gallery is not None), None)

    @property
    def seconds(self) -> float | None:
        """Return the training time of a run, in the mean over seeds; None if nothing was trained here."""
        return None if self.metrics is None else float(self.metrics.groupby("seed")["seconds"].max().mean())

    @property
    def is_trained(self) -> bool:
        """Return whether the runs were trained here; other models were judged only."""
        return bool(self.runs[0].recipe.get("trained", True))

    @property
    def weights(self) -> str:
        """Return which weights were judged: "best" or "last"."""
        return self.runs[0].evaluation["weights"]

    def _across(self, measure: Callable[[pd.DataFrame], pd.DataFrame]) -> pd.DataFrame:
        return outcomes.across_seeds([run.outcomes for run in self.runs], measure)


def _parts_of(recipe: Json) -> str:
    """Describe a recipe without a description by the names of its parts; "" if it has none."""
    if not recipe.get("trained", True):
        return f"Judged, not trained: {_use(recipe, 'model')} on {_use(recipe, 'data')}."
    objective = recipe.get("objective")
    if not isinstance(objective, dict):
        return ""
    defense = _use(recipe, "defense")
    against = f" against {_use(recipe, 'attack')}" if recipe.get("attack") else " without an attack"
    return f"Trained on {' + '.join(objective)}{against}{f', {defense}' if defense not in ('', 'plain') else ''}."


def _use(recipe: Json, part: str) -> str:
    table = recipe.get(part)
    return str(table.get("use", "")) if isinstance(table, dict) else str(table or "")


def results_by_recipe(runs: Sequence[Run]) -> list[RecipeResult]:
    """Group runs by recipe, in order of appearance. Recipes that differ in more than training.seed stay apart.

    Different recipes of one name are told apart by the folder of their first run.

    Raises:
        UnmovedError: no run; a run without evaluation; runs judged on different images, in different balls, by
            different attacks; one recipe with a seed twice, or with best weights judged for one seed and last weights
            for another; AutoAttack's verdicts on its seeds that share no image.
    """
    if not runs:
        raise UnmovedError("expected at least one run, came none")
    read = [EvaluatedRun.of(run) for run in runs]
    _require_alike(read)
    groups: dict[tuple[str, str], list[EvaluatedRun]] = {}
    for run in read:
        recipe = json.dumps(without_seeds(run.recipe), sort_keys=True, default=str)
        groups.setdefault((run.name, recipe), []).append(run)
    for (name, _), members in groups.items():
        seeds, paths = [run.seed for run in members], ", ".join(str(run.path) for run in members)
        if len(set(seeds)) < len(seeds):
            raise UnmovedError(f"recipe {name!r}: expected each seed once, came {seeds} in {paths}; leave one run out")
        weights = [run.evaluation["weights"] for run in members]
        if len(set(weights)) > 1:
            raise UnmovedError(f"recipe {name!r}: seeds judged on {weights} weights in {paths}; evaluate them alike")
    names = [name for name, _ in groups]
    return [
        RecipeResult(name if names.count(name) == 1 else f"{name} [{members[0].path}]", _where_all_are_settled(members))
        for (name, _), members in groups.items()
    ]


def _require_alike(runs: Sequence[EvaluatedRun]) -> None:
    first = runs[0]
    for run in runs[1:]:
        for name, expected, came in zip(EvaluationSetting._fields, first.setting, run.setting, strict=True):
            if came != expected:
                raise UnmovedError(
                    f"expected runs judged alike, came {name} = {expected} in {first.path} and {came} in {run.path}; "
                    "evaluate them alike, or report on them apart"
                )
        require_same_samples(first.outcomes, run.outcomes, (first.path, run.path))
    if (pair := on_replaced_data(runs)) is not None:
        raise UnmovedError(
            f"expected runs judged on the same images, came others in {pair[1].path} than in {pair[0].path}, though "
            "both name the same data: its files were replaced in between; train and evaluate again what is of the "
            "former files (in another folder, or with the old one removed), or report on them apart"
        )


def _where_all_are_settled(runs: Sequence[EvaluatedRun]) -> tuple[EvaluatedRun, ...]:
    """Restrict AutoAttack's outcomes of each seed to the images on which it judged all seeds.

    Sampled verdicts cannot be restricted: they are left out unless all are about the same images.

    Raises:
        UnmovedError: it judged no image in all of them.
    """
    tables = [run.autoattack if run.searched is None else run.searched for run in runs]
    judged = [set(table["index"]) for table in tables if table is not None]
    if not judged or all(images == judged[0] for images in judged):
        return tuple(runs)
    counts = ", ".join(str(len(images)) for images in judged)
    said = f"{runs[0].name}: AutoAttack judged {counts} images of its seeds; "
    if any(run.estimate is not None for run in runs):
        note = said + "a sampled verdict on other images than those of the other seeds is not shown"
        return _where_all_are_settled([_without_estimate(run, note) for run in runs])
    shared = set.intersection(*judged)
    if not shared:
        paths = ", ".join(str(run.path) for run in runs)
        raise UnmovedError(f"expected AutoAttack on the same images of all seeds, came none in common in {paths}")
    note = f"{said}shown are the {len(shared)} in all of them"
    return tuple(
        run
        if run.autoattack is None
        else replace(run, autoattack=run.autoattack[run.autoattack["index"].isin(shared)], stale=(*run.stale, note))
        for run in runs
    )


def _without_estimate(run: EvaluatedRun, note: str) -> EvaluatedRun:
    if run.estimate is None:
        return run
    return replace(run, estimate=None, sampled=None, searched=None, stale=(*run.stale, note))


def without_seeds(recipe: Json) -> Json:
    """Remove the keys in which runs of a recipe differ, training.seed and training.part's number, and the description.

    Every other seed is a setting: data.seed chooses the test images.
    """
    recipe = {key: value for key, value in recipe.items() if key != "description"}
    training = recipe.get("training")
    if not isinstance(training, dict):
        return recipe
    training = {key: value for key, value in training.items() if key != "seed"}
    if isinstance(part := training.get("part"), dict):
        training["part"] = {"of": part.get("of")}
    return {**recipe, "training": training}
