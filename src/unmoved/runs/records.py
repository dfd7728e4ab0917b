"""Read the JSON files of a run folder and check their keys and types. Keys that are not known are kept."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal, NotRequired, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, with_config
from typing_extensions import TypedDict  # pydantic asks for it below Python 3.12

from unmoved.core import untrusted
from unmoved.core.errors import UnmovedError
from unmoved.core.untrusted import Json
from unmoved.evaluation.doctor.finding import GRADES
from unmoved.evaluation.estimate import Estimate

MOST_LOG = 2**26  # bytes of a training log
MOST_PER_CLASS = 2**30  # of what it says of each class
MOST_CELLS = 5 * 10**7  # of its table: lines that have no key in common make one of the square of their number
Finite = Annotated[float, Field(allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]
RecordT = TypeVar("RecordT")
ANY_VERSION = ConfigDict(strict=True, extra="allow")


def is_begun(folder: Path) -> bool:
    """Return whether anything of a training was saved in the folder."""
    names = ("trainer.pt", "trainer.previous.pt", "last.safetensors", "best.safetensors", "metrics.jsonl")
    return any(os.path.lexists(folder / name) for name in names)


def _a_grade(value: str) -> str:
    if value not in GRADES:
        raise ValueError(f"expected one of {', '.join(GRADES)}")
    return value


@with_config(ANY_VERSION)
class Provenance(TypedDict):
    """``provenance.json``: where a run was made."""

    format: NotRequired[int | None]
    weights: NotRequired[dict[str, object]]  # the file of weights that the model began with


@with_config(ANY_VERSION)
class Ball(TypedDict):
    """The ball that an evaluation was made in."""

    norm: str
    eps: float


@with_config(ANY_VERSION)
class Sample(TypedDict):
    """What `unmoved.evaluation.estimate.Estimate` is made of, and the attack that was asked about the sample.

    Attributes:
        attack: the constructor call that makes it.
        kinds: of its parts.
    """

    n: Count
    survivors: int
    near: int
    near_broken: int
    far_asked: int
    far_broken: int
    error: Finite
    attack: str
    kinds: dict[str, str]


@with_config(ANY_VERSION)
class Evaluation(TypedDict):
    """``evaluation.json``, ``verdict.json``, ``sampled.json`` and ``validation.json``: what was judged, and how.

    Attributes:
        question: the sha256 of what the answers depend on.
        images: the digest of the images.
        data: the digest of the whole part of the data that they were drawn from.
        asked, asked_n: the attacks and the number of images, as the user asked for them.
        attacks: name -> the constructor call that makes it.
        kinds: attack -> kind of each of its parts, as `protocols.kinds_of`.
        sample: in ``sampled.json``, what AutoAttack said of a sample of the survivors.
        files: name -> sha256 of the tables and arrays beside it.
    """

    question: NotRequired[str | None]
    images: NotRequired[str | None]
    data: NotRequired[str | None]
    n: Count
    asked_n: NotRequired[Count | None]
    split: NotRequired[str]
    shape: NotRequired[list[int]]
    weights: Literal["best", "last"]
    weights_sha256: str
    precision: NotRequired[str | None]
    threat: NotRequired[Ball | None]
    asked: NotRequired[str | None]
    attacks: dict[str, str]
    kinds: NotRequired[dict[str, dict[str, str]]]
    notes: NotRequired[list[str]]
    classes: NotRequired[list[str]]
    versions: NotRequired[dict[str, str | None]]
    seconds: NotRequired[Finite]
    finished: NotRequired[str | None]
    sample: NotRequired[Sample | None]
    files: NotRequired[dict[str, str]]


@with_config(ANY_VERSION)
class Objection(TypedDict):
    """A finding of the doctor; see `unmoved.evaluation.doctor.finding.Finding`."""

    check: str
    grade: Annotated[str, AfterValidator(_a_grade)]
    measured: str
    why: str
    do: str


@with_config(ANY_VERSION)
class Doctor(TypedDict):
    """``doctor.json``: what the doctor found, and of which weights.

    Attributes:
        evaluation: the sha256 of the outcomes that it read.
        sentence: to put beside the number; "" where nothing objects.
    """

    weights_sha256: str
    evaluation: NotRequired[str | None]
    n: NotRequired[Count | None]
    sentence: NotRequired[str]
    findings: list[Objection]


class Epoch(BaseModel):
    """The keys of a line of ``metrics.jsonl`` that are checked."""

    model_config = ANY_VERSION

    epoch: Count
    seconds: Finite
    train_accuracy: Finite | None = None
    validation_clean: Finite | None = None
    validation_robust: Finite | None = None
    validation_n: Count | None = None
    parts: dict[str, float | None] = {}


class ByClass(BaseModel):
    """A line of ``per_class.jsonl``: beside the epoch, for each term, lists with a number for each class."""

    model_config = ANY_VERSION

    epoch: Count
    __pydantic_extra__: dict[str, dict[str, list[object]]] = Field(init=False)


class _Training(BaseModel):
    model_config = ANY_VERSION

    seed: int = 0


class RecipeHead(BaseModel):
    """The keys of a run's ``recipe.toml`` that are read of a run which is not trained or evaluated now."""

    model_config = ANY_VERSION

    name: str | None = None
    base: str | None = None
    training: _Training = _Training()


PROVENANCE, EVALUATION, DOCTOR = TypeAdapter(Provenance), TypeAdapter(Evaluation), TypeAdapter(Doctor)
_EPOCH, _BY_CLASS, _RECIPE_HEAD = TypeAdapter(Epoch), TypeAdapter(ByClass), TypeAdapter(RecipeHead)


def digest_of_outcomes(facts: Evaluation) -> str | None:
    """Return the sha256 of the outcomes that an evaluation's number is from, of a sampled one AutoAttack's."""
    files = facts.get("files", {})
    return files.get("asked.csv", files.get("outcomes.csv"))


def estimate(facts: Evaluation | None) -> Estimate | None:
    """Return the estimate of a sampled verdict; None where there is none.

    Raises:
        UnmovedError: numbers that are of no sample.
    """
    sample = None if facts is None else facts.get("sample")
    if sample is None:
        return None
    return Estimate(
        n=sample["n"],
        survivors=sample["survivors"],
        near=sample["near"],
        near_broken=sample["near_broken"],
        far_asked=sample["far_asked"],
        far_broken=sample["far_broken"],
        error=sample["error"],
    )


def sample(estimate: Estimate, attack: str, kinds: dict[str, str]) -> Sample:
    """Return what `estimate` reads."""
    return {
        "n": estimate.n,
        "survivors": estimate.survivors,
        "near": estimate.near,
        "near_broken": estimate.near_broken,
        "far_asked": estimate.far_asked,
        "far_broken": estimate.far_broken,
        "error": estimate.error,
        "attack": attack,
        "kinds": kinds,
    }


def attacks_of(facts: Evaluation) -> dict[str, object]:
    """Return the attacks behind the number that an evaluation shows, as `unmoved.evaluation.doctor` takes them."""
    sample = facts.get("sample")
    asked: dict[str, object] = {} if sample is None else {"autoattack": sample["kinds"]}
    return {**facts["attacks"], **facts.get("kinds", {}), **asked}


def difference(one: Evaluation, other: Evaluation) -> str:
    """Return what two evaluations are not both about, ``"weights"`` or ``"data"``, or ``""`` where they agree."""
    if one["weights_sha256"] != other["weights_sha256"]:
        return "weights"
    ours, theirs = one.get("data"), other.get("data")  # older versions did not write it
    return "data" if ours is not None and theirs is not None and ours != theirs else ""


def _checked(kind: TypeAdapter[RecordT], value: Json, where: str, mend: str) -> RecordT:
    """Return the value as a record of this kind.

    Raises:
        UnmovedError: a key is missing or of another type; it names ``where``, the key, and how to mend it.
    """
    try:
        return kind.validate_python(value)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(map(str, first["loc"]))
        came = "" if first["type"] == "missing" else f", came {first['input']!r:.80}"
        raise UnmovedError(f"{where}: {key}: {first['msg']}{came}; unmoved did not write this: {mend}") from None


def read(kind: TypeAdapter[RecordT], path: Path, mend: str) -> RecordT | None:
    """Read a record of this kind from its file; None if there is none.

    Raises:
        UnmovedError: a file that is no regular one, too large, no JSON, or something else than this kind of record.
    """
    try:
        return _checked(kind, untrusted.json_file(path), str(path), mend)
    except FileNotFoundError:
        return None


def recipe(path: Path, mend: str) -> tuple[Json, RecipeHead]:
    """Read the tables of a run's recipe, and those of them that a report reads, checked.

    Raises:
        FileNotFoundError: there is none.
        UnmovedError: as `untrusted.toml_file`.
    """
    tables = untrusted.toml_file(path)
    return tables, _checked(_RECIPE_HEAD, tables, str(path), mend)


def log(path: Path, mend: str) -> list[Json]:
    """Read the lines of a training log; none if there is no log.

    Raises:
        UnmovedError: as `read`; more cells than a log of any training has.
    """
    lines, names = _lines(path, MOST_LOG) or [], set[str]()
    for number, line in enumerate(lines, start=1):
        _checked(_EPOCH, line, f"{path}: line {number}", mend)
        names.update(_leaves(line))
        if len(lines) * len(names) > MOST_CELLS:
            raise UnmovedError(f"{path}: expected at most {MOST_CELLS} numbers, came more; {mend}")
    return lines


def per_class(path: Path, mend: str) -> list[Json] | None:
    """Read the lines of a training's numbers by class; None if there is no such file.

    Raises:
        UnmovedError: as `log`.
    """
    lines = _lines(path, MOST_PER_CLASS)
    if lines is None:
        return None
    rows, names = 0, set[str]()
    for number, line in enumerate(lines, start=1):
        checked = _checked(_BY_CLASS, line, f"{path}: line {number}", mend)
        for facts in checked.__pydantic_extra__.values():
            rows += max(map(len, facts.values()), default=0)
            names.update(facts)
        if rows * (len(names) + 3) > MOST_CELLS:
            raise UnmovedError(f"{path}: expected at most {MOST_CELLS} numbers, came more; {mend}")
    return lines


def _lines(path: Path, most: int) -> list[Json] | None:
    """Read the objects of a file that grows by lines; None if there is none. A last line cut short is left out."""
    try:
        data = untrusted.content(path, most)
    except FileNotFoundError:
        return None
    return untrusted.json_lines(data[: data.rfind(b"\n") + 1], str(path))


def _leaves(line: Json, prefix: str = "") -> Iterator[str]:
    """List the columns that a line has in the table."""
    for key, value in line.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key
