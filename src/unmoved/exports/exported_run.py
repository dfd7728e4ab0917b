"""Read the parts of a run that an export holds: the evaluated weights, and the results about exactly these."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Literal, NamedTuple

import pandas as pd

from unmoved import models
from unmoved.core import untrusted
from unmoved.core.errors import UnmovedError
from unmoved.core.threat import eps_text
from unmoved.core.untrusted import Json, JsonValue
from unmoved.evaluation import outcomes
from unmoved.evaluation.estimate import Estimate
from unmoved.evaluation.outcomes import CLEAN, WORST
from unmoved.runs.evaluated import EvaluatedRun
from unmoved.runs.records import Doctor, Evaluation

if TYPE_CHECKING:
    from unmoved.runs.folder import Run

Kind = Literal["evaluation", "verdict", "sampled", "validation"]
Version = Literal["standard", "rand"]
# AutoAttack's versions, by the names under which `evaluate --attacks standard` and `rand` save their outcomes.
VERSIONS: dict[str, Version] = {"autoattack": "standard", "autoattack-rand": "rand"}


class Result(NamedTuple):
    """Hold a row of `outcomes.summary`: how many of n images a model gets right, with Wilson's 95 % interval."""

    measure: str
    eps: float
    correct: int
    n: int
    accuracy: float
    low: float
    high: float


@dataclass(frozen=True, eq=False)
class Judgement:
    """Hold one evaluation of the exported weights.

    Attributes:
        kind: the folder that it is saved in: ``"evaluation"``, ``"verdict"``, ``"sampled"`` or ``"validation"``.
        facts: the JSON record beside its outcomes.
        results: "clean", each attack and "worst case", in this order.
        norm, eps: the ball, from the outcomes.
        estimate: of a sampled verdict, whose results are its cheap attack's: what this and AutoAttack leave.
    """

    kind: Kind
    facts: Evaluation
    results: tuple[Result, ...]
    norm: str
    eps: float
    estimate: Estimate | None = None

    @classmethod
    def of(cls, kind: Kind, facts: Evaluation, table: pd.DataFrame, estimate: Estimate | None = None) -> Judgement:
        rows = outcomes.summary(table, is_checked=True)[list(Result._fields)].itertuples(index=False, name=None)
        norm, eps = str(table["norm"].iloc[0]), float(table["eps"].iloc[0])
        return cls(kind, facts, tuple(Result(*row) for row in rows), norm, eps, estimate)

    @property
    def clean(self) -> Result:
        return self.results[0]

    @property
    def worst(self) -> Result:
        return next(result for result in self.results if result.measure == WORST)

    @property
    def attacked(self) -> tuple[Result, ...]:
        """Return the results of the attacks alone."""
        return tuple(result for result in self.results if result.measure not in (CLEAN, WORST))

    @property
    def split(self) -> str:
        return self.facts.get("split", "unknown")

    def settings(self, attack: str) -> str:
        """Return the constructor call that makes an attack; "" where an older version did not keep it."""
        return self.facts["attacks"].get(attack, "")

    @property
    def sampling(self) -> str:
        """Return the constructor call of the attack that was run on a sample; "" if there is none."""
        sample = self.facts.get("sample")
        return "" if sample is None else sample["attack"]

    def autoattack(self, attack: str) -> Version | None:
        """Return which version of AutoAttack an attack is: ``"standard"`` or ``"rand"``; None for any other attack.

        The attack's name proves nothing, since a recipe may give it to a weaker ensemble. Only the command writes the
        folder ``verdict``, and the settings name class and version.
        """
        version = VERSIONS.get(attack)
        settings = self.settings(attack)
        is_ours = settings.startswith("AutoAttack(") and f"version={version!r}" in settings
        return version if self.kind == "verdict" and is_ours else None


@dataclass(frozen=True, eq=False)
class ExportedRun:
    """Hold an evaluated run as its export describes it.

    Attributes:
        weights: ``"best"`` or ``"last"``: those that were evaluated.
        data: the bytes of their file.
        judgements: the evaluations of these weights: those of the recipe's attacks, AutoAttack's, complete or sampled,
            and that of validation images, as far as there are.
        doctor: the doctor's findings about these weights and outcomes, or None.
        left_out: results in the run folder that are about other weights or outcomes.
        about: what the user adds about the model: license, title, authors, link, venue.
    """

    evaluated: EvaluatedRun
    weights: Literal["best", "last"]
    data: bytes
    judgements: tuple[Judgement, ...]
    left_out: tuple[str, ...]
    about: Mapping[str, str]

    @classmethod
    def of(cls, run: Run, about: Mapping[str, str] | None = None) -> ExportedRun:
        """Read a run.

        Raises:
            UnmovedError: it was not evaluated, or trained since; what the readers of a run folder refuse.
        """
        evaluated = EvaluatedRun.of(run)
        which, left_out = evaluated.evaluation["weights"], list(evaluated.stale)
        data = _evaluated_weights(run, which, evaluated.evaluation["weights_sha256"])
        judgements = []
        settled = evaluated.sampled or evaluated.verdict
        if evaluated.evaluation is not settled:
            judgements.append(Judgement.of("evaluation", evaluated.evaluation, evaluated.outcomes))
        if evaluated.verdict is not None and evaluated.autoattack is not None:
            judgements.append(Judgement.of("verdict", evaluated.verdict, evaluated.autoattack))
        if evaluated.sampled is not None and evaluated.searched is not None:
            judgements.append(Judgement.of("sampled", evaluated.sampled, evaluated.searched, evaluated.estimate))
            _require_autoattack(run, judgements[-1].sampling)
        validation = run.validation
        if validation is not None and validation["weights_sha256"] != evaluated.evaluation["weights_sha256"]:
            left_out.append(
                f"{run.path}: the evaluation on validation images is about other weights, so it is not shown; "
                f"`unmoved evaluate {run.path} --validation` renews it"
            )
        elif validation is not None and (table := run.validation_outcomes) is not None:
            judgements.append(Judgement.of("validation", validation, table))
        return cls(evaluated, which, data, tuple(judgements), tuple(left_out), about or {})

    @property
    def name(self) -> str:
        return self.evaluated.name

    @property
    def recipe(self) -> Json:
        return self.evaluated.recipe

    def table(self, name: str) -> Json:
        """Return a table of the recipe; empty where it has none.

        Raises:
            UnmovedError: something else than a table.
        """
        found = self.recipe.get(name, {})
        if not isinstance(found, dict):
            where = self.evaluated.path / "recipe.toml"
            raise UnmovedError(f"{where}: {name}: expected a table, came {found!r:.80}; train the run again")
        return found

    @property
    def doctor(self) -> Doctor | None:
        return self.evaluated.doctor

    @property
    def trained(self) -> bool:
        """Return whether it was trained here; False where a model that was trained elsewhere was judged."""
        return bool(self.recipe.get("trained", True))

    @cached_property
    def sha256(self) -> str:
        return hashlib.sha256(self.data).hexdigest()

    @property
    def main(self) -> Judgement:
        """Return the judgement whose figures come first: AutoAttack's, or that of the recipe's attacks."""
        return self.verdict or self.sampled or self.judgements[0]

    @property
    def verdict(self) -> Judgement | None:
        return next((judgement for judgement in self.judgements if judgement.kind == "verdict"), None)

    @property
    def sampled(self) -> Judgement | None:
        """Return the sampled verdict; there is none beside a complete one."""
        return next((judgement for judgement in self.judgements if judgement.estimate is not None), None)

    @property
    def standard(self) -> Judgement | None:
        """Return the verdict of AutoAttack's standard version, the only one called just AutoAttack."""
        verdict = self.verdict
        is_standard = verdict is not None and [verdict.autoattack(r.measure) for r in verdict.attacked] == ["standard"]
        return verdict if is_standard else None

    @property
    def tested(self) -> tuple[Judgement, ...]:
        """Return the judgements on test images."""
        return tuple(judgement for judgement in self.judgements if judgement.kind != "validation")

    @property
    def dataset(self) -> str:
        """Return the name of the data, such as ``"mnist"``."""
        return self.main.split.removesuffix("/test")

    @property
    def classes(self) -> list[str]:
        return self.main.facts.get("classes", [])

    @cached_property
    def shape(self) -> tuple[int, int, int] | None:
        """Return the shape (C, H, W) of an image; None where no file says it."""
        told: Sequence[int] = next((j.facts["shape"] for j in self.judgements if j.facts.get("shape")), ())
        if not told and self.evaluated.gallery is not None:
            told = self.evaluated.gallery["x"].shape[1:]
        return (int(told[0]), int(told[1]), int(told[2])) if len(told) == 3 else None

    @property
    def eps(self) -> str:
        return eps_text(self.main.eps)


def _require_autoattack(run: Run, settings: str) -> None:
    """Raise `UnmovedError` if another attack than AutoAttack's standard version was run on a sample."""
    if not (settings.startswith("AutoAttack(") and "version='standard'" in settings):
        raise UnmovedError(
            f"{run.path}: expected a sampled verdict of AutoAttack's standard version, came one of {settings!r:.80}; "
            f"run `unmoved evaluate {run.path} --attacks standard --sample N` again"
        )


def _evaluated_weights(run: Run, which: str, expected: str) -> bytes:
    """Return the bytes of the weights file that was evaluated.

    Raises:
        UnmovedError: there is none, or it is another one now.
    """
    path = run.path / f"{which}.safetensors"
    try:
        models.require_header(path)
        data = untrusted.content(path, path.stat().st_size)
    except FileNotFoundError:
        raise UnmovedError(
            f"{path}: expected the weights that were evaluated, came no file; train the run again"
        ) from None
    if hashlib.sha256(data).hexdigest() != expected:
        raise UnmovedError(
            f"{path}: expected the weights that were evaluated, came others: it was trained since; "
            f"run `unmoved evaluate {run.path}` again"
        )
    return data


def as_json(value: object) -> JsonValue:
    """Return plain data as JSON can hold it: a number that is not finite becomes its name."""
    if isinstance(value, Mapping):
        return {str(key): as_json(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [as_json(part) for part in value]
    if isinstance(value, float) and not math.isfinite(value) or not isinstance(value, str | int | float | None):
        return str(value)
    return value
