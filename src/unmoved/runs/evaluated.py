"""Read an evaluated run: its outcomes, AutoAttack's and the doctor's findings, all about one model and its data."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pandas as pd

from unmoved.core.errors import UnmovedError
from unmoved.core.untrusted import Json
from unmoved.evaluation.estimate import Estimate
from unmoved.evaluation.outcomes import CLEAN, ROBUST
from unmoved.runs import records
from unmoved.runs.assembly import IN_PYTHON
from unmoved.runs.records import Doctor, Evaluation, Provenance, difference, digest_of_outcomes

if TYPE_CHECKING:
    from unmoved.runs.folder import Run

# The parts of the ensembles in the order in which they run.
PARTS = ("apgd-ce", "apgd-dlr", "apgd-margin", "apgd-t", "apgd-margin-t", "fab-t", "square")


class EvaluationSetting(NamedTuple):
    """Describe how a run was evaluated: two runs are comparable if these agree."""

    split: str
    norm: str
    eps: float
    attacks: tuple[str, ...]
    n: int


@dataclass(frozen=True, eq=False)
class EvaluatedRun:
    """Hold an evaluated run, read from its folder once (a `Run` reads its files anew each time it is asked).

    Of AutoAttack's evaluations only the one that `Run.shown` names is held: a complete verdict or a sampled one.

    Attributes:
        verdict, autoattack: the facts and the outcomes of AutoAttack's complete verdict.
        sampled, searched: the facts of a sampled verdict, and the outcomes of its cheap attack on all n images.
        estimate: the number of images that this attack and AutoAttack together leave robust.
        stale: which results are not shown, and why: other weights, other data, or fewer images than the evaluation.
    """

    path: Path
    name: str
    seed: int
    recipe: Json
    provenance: Provenance
    metrics: pd.DataFrame
    outcomes: pd.DataFrame
    curve: pd.DataFrame | None
    gallery: dict[str, np.ndarray] | None
    evaluation: Evaluation
    autoattack: pd.DataFrame | None = None
    verdict: Evaluation | None = None
    sampled: Evaluation | None = None
    searched: pd.DataFrame | None = None
    estimate: Estimate | None = None
    doctor: Doctor | None = None
    stale: tuple[str, ...] = ()

    @classmethod
    def of(cls, run: Run) -> EvaluatedRun:
        """Read a run; if only AutoAttack has judged it, completely or on a sample, use those outcomes.

        Raises:
            UnmovedError: it was not evaluated, or its outcomes do not hold the samples that its evaluation names.
        """
        evaluation, metrics, shown = run.evaluation, run.metrics, run.shown
        table = None if evaluation is None else run.outcomes
        # Results beside an interrupted evaluation may be about any weights.
        curve, gallery = (None, {}) if table is None else (run.curve, run.gallery or {})
        verdict = autoattack = sampled = searched = None
        if shown == "sampled":
            sampled, searched = run.sampled, run.sampled_outcomes
        elif shown == "verdict" or table is None:
            verdict, autoattack = run.verdict, run.verdict_outcomes
        judged = [(verdict, autoattack), (sampled, searched)]
        if table is None:
            evaluation, table = judged[shown == "sampled"]
        if evaluation is None or table is None:
            raise UnmovedError(
                f"{run.path}: expected an evaluated run, came none; run `unmoved evaluate {run.path}` first"
            )
        for facts, rows in [(evaluation, table), *judged]:
            if facts is not None and rows is not None:
                _require_whole(run, facts, rows)
        doctor, stale = _opinion(run, evaluation, verdict or sampled)
        if len(gallery.get("x", ())):
            _require_images(run, gallery)
        return cls(
            path=run.path,
            name=run.name,
            seed=run.seed,
            recipe=run.recipe,
            provenance=run.provenance,
            metrics=metrics,
            outcomes=table,
            curve=curve,
            gallery=gallery if len(gallery.get("x", ())) else None,
            evaluation=evaluation,
            autoattack=autoattack,
            verdict=verdict if autoattack is not None else None,
            sampled=sampled if searched is not None else None,
            searched=searched,
            estimate=None if searched is None else _estimate(run, sampled),
            doctor=doctor,
            stale=(*_not_shown(run, evaluation, shown), *stale),
        )

    @property
    def is_of_objects(self) -> bool:
        """Return whether model and data were objects in Python, which no command can build again."""
        return _is_of_objects(self.recipe)

    @cached_property
    def setting(self) -> EvaluationSetting:
        return EvaluationSetting(
            split=self.evaluation.get("split", "unknown"),
            norm=str(self.outcomes["norm"].iloc[0]),
            eps=float(self.outcomes["eps"].max()),
            attacks=tuple(sorted(self.outcomes["attack"].unique())),
            n=int(self.outcomes["index"].nunique()),
        )

    @cached_property
    def broken(self) -> pd.DataFrame:
        """Return the share of samples that each attack broke first: by, place in the order of attacks, share.

        From AutoAttack's outcomes if there are any. A sample that several attacks broke counts for the first alone.
        """
        table, facts = self.outcomes, self.evaluation
        if self.autoattack is not None and self.verdict is not None:
            table, facts = self.autoattack, self.verdict
        by = {str(attack): rows.set_index("index")["by"] for attack, rows in table.groupby("attack", sort=False)}
        ordered = [name for name in facts["attacks"] if name in by]
        ordered += [name for name in by if name not in ordered]
        first, places = by[ordered[-1]], {CLEAN: -1.0, ROBUST: np.inf}
        for attack in reversed(ordered):
            first = by[attack].where(by[attack] != ROBUST, first)
        for number, attack in enumerate(ordered):
            for part in set(by[attack]):
                place = PARTS.index(part) if part in PARTS else 0
                places.setdefault(part, float(len(PARTS) * number + place))
        shares = first.value_counts(normalize=True)
        return pd.DataFrame(
            [{"by": part, "place": places[str(part)], "share": share} for part, share in shares.items()]
        )


def _is_of_objects(recipe: Json) -> bool:
    data = recipe.get("data")
    return isinstance(data, dict) and data.get("use") == IN_PYTHON


def samples_of(table: pd.DataFrame) -> pd.DataFrame:
    """Return the samples that a table is about: index and label, sorted, each once."""
    return table[["index", "label"]].drop_duplicates().sort_values(["index", "label"], ignore_index=True)


def require_same_samples(ours: pd.DataFrame, theirs: pd.DataFrame, names: tuple[object, object]) -> None:
    """Raise `UnmovedError` unless two tables with columns index and label are about the same samples and labels.

    Accuracies on different images cannot be averaged over seeds, nor compared pairwise. Rows may repeat a sample and
    come in any order.
    """
    first, second = samples_of(ours), samples_of(theirs)
    if first.equals(second):
        return
    sets, (one, other) = [set(table["index"]) for table in (first, second)], names
    if sets[0] != sets[1]:
        raise UnmovedError(
            f"expected runs on the same data, came {one} and {other}, whose test images differ ({len(sets[0])} and "
            f"{len(sets[1])}, {len(sets[0] & sets[1])} of them in both); judge them on the same images (one data.seed, "
            "one evaluation.n), or look at each data set apart"
        )
    raise UnmovedError(
        f"expected runs on the same data, came other labels in {other} than in {one}; look at each data set apart"
    )


def on_replaced_data(runs: Sequence[EvaluatedRun]) -> tuple[EvaluatedRun, EvaluatedRun] | None:
    """Return two runs that name the same data and were judged on different images, since its files were replaced.

    Data under other names is not looked at: the digest is of bytes, and the same images may be stored in other forms.
    """
    known: dict[str, EvaluatedRun] = {}
    for run in runs:
        if run.evaluation.get("data") is not None:  # older versions did not write it
            first = known.setdefault(json.dumps(run.recipe.get("data"), sort_keys=True, default=str), run)
            if first.evaluation.get("data") != run.evaluation.get("data"):
                return first, run
    return None


def _not_shown(run: Run, evaluation: Evaluation, shown: str) -> list[str]:
    """Say which of AutoAttack's verdicts, complete or sampled, the run has and is not reported from."""
    which = "" if evaluation["weights"] == "best" else f" --weights {evaluation['weights']}"
    again, said, found = f"evaluate {run.path} --attacks standard", list[str](), {}
    for kind, what, how in (("verdict", "AutoAttack's verdict", ""), ("sampled", "the sampled verdict", " --sample N")):
        facts = found[kind] = run.verdict if kind == "verdict" else run.sampled
        if facts is not None and (other := difference(evaluation, facts)):
            said.append(_stale(what, run, f"{again}{how}{which}", other))
            found[kind] = None
    if shown == "sampled" and (verdict := found["verdict"]) is not None and (sampled := found["sampled"]) is not None:
        said.append(
            f"{run.path}: AutoAttack's complete verdict is about {verdict['n']} images, the sampled one about "
            f"{sampled['n']}: that is shown"
        )
    return said


def _opinion(run: Run, evaluation: Evaluation, settled: Evaluation | None) -> tuple[Doctor | None, list[str]]:
    """Return the doctor's findings about the outcomes that are shown, or None and the reasons."""
    doctor = run.doctor
    if doctor is None:
        return None, []
    if doctor["weights_sha256"] != evaluation["weights_sha256"]:
        return None, [_stale("the doctor's opinion", run, f"doctor {run.path}")]
    digest = digest_of_outcomes(settled or evaluation)
    if digest is not None and doctor.get("evaluation") != digest:
        than = "the evaluation" if settled is None else "AutoAttack's"
        return None, [_stale("the doctor's opinion", run, f"doctor {run.path}", "outcomes", than)]
    return doctor, []


def _stale(what: str, run: Run, command: str, other: str = "weights", than: str = "the evaluation") -> str:
    again = "`unmoved.judge`, called in Python as before," if _is_of_objects(run.recipe) else f"`unmoved {command}`"
    return f"{run.path}: {what} is about other {other} than {than}, so it is not shown; {again} renews it"


def _require_whole(run: Run, facts: Evaluation, table: pd.DataFrame) -> None:
    n = table["index"].nunique()
    if facts["n"] != n:
        raise UnmovedError(
            f"{run.path}: expected outcomes of {facts['n']} samples, came {n}; run `unmoved evaluate {run.path}` again"
        )


def _estimate(run: Run, facts: Evaluation | None) -> Estimate:
    """Return the estimate of a sampled verdict.

    Raises:
        UnmovedError: there is none, or it is about other images than the outcomes.
    """
    estimate = records.estimate(facts)
    if facts is None or estimate is None or estimate.n != facts["n"]:
        raise UnmovedError(
            f"{run.path}: expected the counts of a sample in sampled.json, came none about these images; "
            f"run `unmoved evaluate {run.path} --attacks standard --sample N` again"
        )
    return estimate


def _require_images(run: Run, gallery: Mapping[str, np.ndarray]) -> None:
    """Raise `UnmovedError` unless a gallery holds pairs of images (M, C, H, W) and their labels (M,)."""
    empty = np.zeros(0)
    x, x_adv = gallery["x"], gallery.get("x_adv", empty)
    good = x.ndim == 4 and x.size > 0 and x.shape == x_adv.shape and {x.dtype.kind, x_adv.dtype.kind} == {"f"}
    for name in ("label", "clean_prediction", "adversarial_prediction"):
        values = gallery.get(name, empty)
        good = good and values.dtype.kind in "iu" and values.shape == (len(x),)
    if (
        not good
        or gallery.get("attack", empty).shape != (len(x),)
        or not np.isfinite(x).all()
        or not np.isfinite(x_adv).all()
    ):
        raise UnmovedError(f"{run.path}: its gallery holds no images; run `unmoved evaluate {run.path}` again")
