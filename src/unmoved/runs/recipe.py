"""Read and check recipes: TOML files that describe a run in full."""

from __future__ import annotations

import copy
import itertools
import re
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, TypeAdapter, ValidationError, field_validator, model_validator

from unmoved import data
from unmoved.core.errors import UnmovedError, did_you_mean
from unmoved.core.precision import PRECISIONS
from unmoved.core.threat import ThreatModel
from unmoved.core.untrusted import LONGEST, Json, JsonValue, readable, require_plain, text_file, toml
from unmoved.evaluation.outcomes import CLEAN, WORST
from unmoved.runs import packaged_recipes, recipe_errors
from unmoved.runs.components import (
    KINDS,
    AttackTable,
    AverageTable,
    DataTable,
    DefenseTable,
    ModelTable,
    Number,
    OptimizerTable,
    ScheduleTable,
    Settings,
    TermTable,
    Whole,
)
from unmoved.runs.suggestions import recipe_meant
from unmoved.training.overfitting import GO_ON

# The tables that say nothing about a model that is judged only.
OF_TRAINING = ("training", "optimizer", "schedule", "average", "attack", "objective", "defense", "phases", "validation")
PIPES = (Path("/dev/fd"), Path("/dev"))


def _by_default(use: str) -> Any:
    """Return the field of a component which is this one, with its defaults, if the recipe says nothing."""
    return Field({"use": use})


class Threat(Settings):
    """The ball of allowed perturbations, on images in [0, 1]."""

    norm: str = "linf"
    eps: Number

    @model_validator(mode="after")
    def _is_a_ball(self) -> Threat:
        ThreatModel(self.norm, self.eps)
        return self


class DataPart(Settings):
    """One of ``of`` disjoint parts of equal size of the training data, after a permutation by its number."""

    of: Whole = Field(ge=2)
    number: Whole = Field(ge=0)
    permutation: Whole = Field(0, ge=0)

    @model_validator(mode="after")
    def _exists(self) -> DataPart:
        if self.number >= self.of:
            raise ValueError(f"expected a part 0..{self.of - 1}, came {self.number}")
        return self


class SweptFrom(Settings):
    """What a sweep has set: the recipe it started from, and its values by key."""

    method: str
    values: dict[str, str]


class Training(Settings):
    """How long and on what."""

    epochs: Whole = Field(30, ge=1)
    batch_size: Whole = Field(128, ge=1)
    seed: Whole = Field(0, ge=0)
    validation: Number = Field(
        0.1, ge=0, allow_inf_nan=False, description="held out of the training data: a share, or a count above 1"
    )
    part: DataPart | None = None
    augment: str = "none"
    precision: str = "auto"
    compiled: bool = Field(False, description="passes made by torch.compile: slow to begin, made for GPUs")
    sync_batchnorm: bool = Field(False, description="BatchNorm over the samples of all processes; on GPUs")
    on_overfitting: Literal["go_on", "stop", "go_back"] = Field(
        "go_on", description="where the validation sees catastrophic overfitting: name it, stop, or go back and go on"
    )
    checkpoint_share: Number = Field(
        0.03, ge=0, le=1, description="most of the time that saving may take; 1 saves every epoch"
    )

    @model_validator(mode="after")
    def _overfitting_is_seen(self) -> Training:
        if self.on_overfitting != GO_ON and not self.validation:
            raise ValueError(
                f"on_overfitting: expected validation data to notice it by, came validation = 0 with "
                f'"{self.on_overfitting}"; hold some out, or leave it at "{GO_ON}"'
            )
        return self

    @field_validator("precision")
    @classmethod
    def _known_precision(cls, value: str) -> str:
        if value not in PRECISIONS:
            raise ValueError(f"unknown value {value!r}" + did_you_mean(value, PRECISIONS))
        return value

    @field_validator("augment")
    @classmethod
    def _known_augment(cls, value: str) -> str:
        data.augmentation(value)
        return value


class Phase(Settings):
    """What changes from an epoch on; the changes add up from phase to phase."""

    from_epoch: Whole = Field(ge=1)
    attack: dict[str, object] | None = None
    objective: dict[str, dict[str, object]] | None = None
    defense: dict[str, object] | None = None

    @field_validator("attack", "defense", mode="before")
    @classmethod
    def _a_bare_name_is_a_table(cls, value: object) -> object:
        return {"use": value} if isinstance(value, str) else value


class Evaluation(Settings):
    """What ``unmoved evaluate`` runs; by default PGD with 20 steps and APGD with 100."""

    n: Whole | None = Field(None, ge=1)
    attacks: dict[str, AttackTable] = {}

    @field_validator("attacks")
    @classmethod
    def _names_may_name_files(cls, attacks: dict[str, AttackTable]) -> dict[str, AttackTable]:
        for name in attacks:
            if not re.fullmatch(r"\w[\w .+=-]{0,99}", name):
                raise ValueError(f"expected names of at most 100 letters, digits and -+=._, came {name!r:.200}")
            if name in (CLEAN, WORST):
                raise ValueError(f"{name!r} is a measure's name; call the attack otherwise")
        return attacks


class PhaseParts(Settings):
    """What may change from phase to phase: attack, objective and defense."""

    attack: AttackTable | None = None
    objective: dict[str, TermTable] = Field(min_length=1)
    defense: DefenseTable = _by_default("plain")

    @field_validator("objective", mode="before")
    @classmethod
    def _use_defaults_to_the_name(cls, value: object) -> object:
        if isinstance(value, Mapping) and isinstance(value.get("use"), str):
            raise ValueError(f"expected named terms, such as [objective.{value['use']}]")
        if isinstance(value, Mapping):
            return {k: {"use": k, **t} if isinstance(t, Mapping) else t for k, t in value.items()}
        return value

    @field_validator("attack", mode="before")
    @classmethod
    def _no_attack(cls, value: object) -> object:
        return None if value == "none" or isinstance(value, Mapping) and value.get("use") == "none" else value


class Recipe(PhaseParts):
    """A run, described in full. ``[objective.NAME]`` tables are terms; ``use`` defaults to NAME."""

    name: str = "recipe"
    description: str | None = Field(
        None, max_length=2000, description="what it is; the file's first comment by default"
    )
    trained: bool = Field(True, description="false where a model is judged that was trained elsewhere")
    base: str | None = Field(None, description="the name of the recipe that the report sets this one beside")
    swept: SweptFrom | None = Field(None, description="set by `unmoved compare --sweep`")
    objective: dict[str, TermTable] = {}
    data: DataTable
    model: ModelTable
    threat: Threat
    training: Training = Training()
    optimizer: OptimizerTable = _by_default("sgd")
    schedule: ScheduleTable = _by_default("constant")
    average: AverageTable = _by_default("none")
    phases: list[Phase] = []
    validation: AttackTable | None = None
    evaluation: Evaluation = Evaluation()

    @field_validator("name")
    @classmethod
    def _may_name_a_folder(cls, name: str) -> str:
        if not name.isprintable() or len(name) > 500 or "\\" in name or not name.strip("./ "):
            raise ValueError(
                f"expected at most 500 printable characters, not dots alone, no backslash; came {name!r:.250}"
            )
        return name

    @model_validator(mode="after")
    def _trained_by_an_objective(self) -> Recipe:
        if self.trained and not self.objective:
            raise ValueError("objective: expected at least one term, such as [objective.ce], came none")
        if not self.trained and (extra := sorted(self.model_fields_set & {*OF_TRAINING})):
            raise ValueError(f"trained = false: expected no table about training, came {', '.join(extra)}")
        return self

    @model_validator(mode="after")
    def _phases_are_methods(self) -> Recipe:
        starts = [0, *(phase.from_epoch for phase in self.phases)]
        if any(b <= a for a, b in zip(starts, starts[1:], strict=False)):
            raise ValueError(f"phases: from_epoch must increase, came {starts[1:]}")
        for start, tables in self.phase_parts()[1:]:
            try:
                PhaseParts.model_validate(tables)
            except ValidationError as error:
                raise ValueError(f"phase from epoch {start}: " + "; ".join(_mistakes(error, tables))) from None
        return self

    def phase_parts(self) -> list[tuple[int, Json]]:
        """Return (first epoch, tables of attack, objective and defense) of each phase, changes merged in."""
        result: list[tuple[int, Json]] = [(0, self.model_dump(include=set(PhaseParts.model_fields), by_alias=True))]
        for phase in self.phases:
            changes = phase.model_dump(exclude={"from_epoch"}, exclude_none=True)
            result.append((phase.from_epoch, _merged(result[-1][1], changes)))
        return result

    def setting(self) -> Json:
        """Return what decides the result: `tables` without the description."""
        return {key: value for key, value in self.tables().items() if key != "description"}

    def tables(self) -> Json:
        """Return the fully resolved recipe as plain data, which `unmoved show` prints."""
        order = ["name", "description", "trained", "base", "swept", "data", "model", "threat"]
        order += ["training", "optimizer", "schedule", "average"]
        tables = {key: _without_none(part) for key, part in self.model_dump(by_alias=True, exclude_none=True).items()}
        for key in ("trained",) if self.trained else OF_TRAINING:
            tables.pop(key, None)
        return {key: tables[key] for key in dict.fromkeys([*order, *tables]) if key in tables}


def _merged(base: Json, changes: Json) -> Json:
    """Merge tables key by key; a ramp, or a table whose ``use`` changes, is replaced as a whole."""
    if changes.get("use", base.get("use")) != base.get("use") or {"from", "to"} <= base.keys():
        return copy.deepcopy(changes)
    result = base | copy.deepcopy(changes)
    for key, change in changes.items():
        before = base.get(key)
        if isinstance(before, dict) and isinstance(change, dict):
            result[key] = _merged(before, change)
    return result


def _without_none(value: JsonValue) -> JsonValue:
    if isinstance(value, dict):
        return {key: _without_none(part) for key, part in value.items() if part is not None}
    return [_without_none(part) for part in value] if isinstance(value, list | tuple) else value


# --- files -> recipes


def read(path: Path | str, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe, with ``a.b=value`` overrides.

    Args:
        path: a file, or the name of a recipe that comes with the package, such as ``digits/at``; a file wins.

    Raises:
        UnmovedError: a file that is missing or not TOML, or a wrong key or value; it names file, key and remedy.
    """
    asked = Path(path)
    try:
        path = packaged_recipes.located(asked)
        if path.is_fifo() and path.parent in PIPES:  # what a shell puts in the place of <(...)
            with path.open(encoding="utf-8") as file:
                text = file.read(LONGEST + 1)
        else:
            text = text_file(path, f"recipe {asked}")
        tables = toml(text, f"recipe {asked}")
    except FileNotFoundError:
        raise UnmovedError(f"recipe {asked}: no such file" + recipe_meant(asked, KINDS)) from None
    except (OSError, UnicodeError) as error:
        raise UnmovedError(f"recipe {asked}: cannot be read: {error}") from error
    tables.setdefault(
        "name", readable("/".join(part for part in (path.parent.name, path.stem) if part)).replace("\\", "-")
    )
    if words := _first_comment(text):
        tables.setdefault("description", words)
    for override in overrides:
        _override(tables, override)
    return parse(tables, str(asked))


def _first_comment(text: str) -> str:
    """Return the comment that a file begins with, one line for each of its lines; "" where there is none."""
    head = itertools.takewhile(lambda line: line.startswith("#"), text.splitlines())
    return "\n".join(line.lstrip("# ") for line in head)[:2000].strip()


def parse(tables: Json, where: str = "recipe") -> Recipe:
    """Make a recipe from plain data; errors name ``where``.

    Raises:
        UnmovedError: as `read`.
    """
    require_plain(tables, where)
    try:
        return Recipe.model_validate(tables)
    except ValidationError as error:
        raise UnmovedError("\n".join(f"{where}: {message}" for message in _mistakes(error, tables))) from None


def attack_table(table: str | Mapping[str, object]) -> AttackTable:
    """Return the checked table of an attack that ``--attacks`` names.

    Raises:
        UnmovedError: settings that it does not have.
    """
    try:
        attack: AttackTable = TypeAdapter(AttackTable).validate_python(table)
    except ValidationError as error:
        raise UnmovedError("\n".join(f"--attacks: {line}" for line in _mistakes(error, {}))) from None
    return attack


def differing(saved: Recipe, tables: Json) -> list[str]:
    """Return the keys in which a saved recipe differs from the tables of another one, whatever they call themselves.

    It is parsed: one of an older version lacks the keys that were added since, which have their defaults.
    """
    begun = saved.tables()
    return sorted(key for key in {*tables, *begun} - {"description"} if tables.get(key) != begun.get(key))


def _override(tables: Json, override: str) -> None:
    """Apply ``a.b=value``; the value is TOML where it can be, else a string."""
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise UnmovedError(f"--set {override!r}: expected key=value, such as training.epochs=5")
    try:
        value = toml(f"value = {text}", f"--set {override!r:.200}")["value"]
    except UnmovedError as error:
        if not isinstance(error.__cause__, tomllib.TOMLDecodeError):
            raise
        value = text
    *parents, last = key.split(".")
    target: JsonValue = tables
    for part in parents:
        if isinstance(target, list):
            if not part.isdecimal() or int(part) >= len(target):
                raise UnmovedError(f"--set {override!r}: expected an index below {len(target)}, came {part!r}")
            target = target[int(part)]
        elif isinstance(target, dict):
            if isinstance(target.get(part), str):
                target[part] = {"use": target[part]}
            target = target.setdefault(part, {})
        if not isinstance(target, dict | list):
            raise UnmovedError(f"--set {override!r}: {part!r} is a value, not a table")
    if not isinstance(target, dict):
        raise UnmovedError(f"--set {override!r}: expected the index of a phase before {last!r}")
    if last == "use" and target.get("use") not in (None, value):  # another component: the settings were of the old
        target.clear()
    target[last] = value


def _mistakes(error: ValidationError, tables: Json) -> list[str]:
    """Return a line for each mistake in a recipe's tables."""
    return recipe_errors.messages(error, Recipe, tables)
