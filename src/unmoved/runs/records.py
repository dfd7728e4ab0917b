"""Read the JSON files of a run folder and check their keys and types. Further keys are let through."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from unmoved.core import untrusted
from unmoved.core.errors import UnmovedError
from unmoved.evaluation.doctor.finding import GRADES

MOST_LOG = 2**26  # bytes of a training log
MOST_PER_CLASS = 2**30  # of what it says of each class
MOST_CELLS = 5 * 10**7  # of its table: lines that have no key in common make one of the square of their number
Finite = Annotated[float, Field(allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]


class Record(BaseModel):
    """A JSON object that unmoved wrote, whatever version of it."""

    model_config = ConfigDict(strict=True, extra="allow")


class Provenance(Record):
    """``provenance.json``: where a run was made."""

    format: int | None = None


class Ball(Record):
    """The ball that an evaluation was made in."""

    norm: str
    eps: float


class Evaluation(Record):
    """``evaluation.json`` and its like: what was judged, and how."""

    n: Count
    weights: Literal["best", "last"]
    weights_sha256: str
    split: str = "unknown"
    shape: list[int] = []
    attacks: dict[str, str]
    kinds: dict[str, dict[str, str]] = {}
    asked: str | None = None
    asked_n: Count | None = None
    precision: str | None = None
    threat: Ball | None = None
    notes: list[str] = []
    classes: list[str] = []
    seconds: Finite = 0.0
    finished: str | None = None
    versions: dict[str, str | None] = {}
    question: str | None = None
    images: str | None = None
    files: dict[str, str] = {}


def _a_grade(value: str) -> str:
    if value not in GRADES:
        raise ValueError(f"expected one of {', '.join(GRADES)}")
    return value


class Objection(Record):
    """A finding of the doctor."""

    check: str
    grade: Annotated[str, AfterValidator(_a_grade)]
    measured: str
    why: str
    do: str


class Doctor(Record):
    """``doctor.json``: what the doctor found, and of which weights."""

    weights_sha256: str
    n: Count | None = None
    evaluation: str | None = None
    sentence: str = ""
    findings: list[Objection]


class Epoch(Record):
    """A line of ``metrics.jsonl``."""

    epoch: Count
    seconds: Finite
    train_accuracy: Finite | None = None
    validation_clean: Finite | None = None
    validation_robust: Finite | None = None
    validation_n: Count | None = None
    parts: dict[str, float | None] = {}


class ByClass(Record):
    """A line of ``per_class.jsonl``: beside the epoch, for each term, lists with a number for each class."""

    epoch: Count
    __pydantic_extra__: dict[str, dict[str, list[Any]]] = Field(init=False)


class _Training(Record):
    seed: int = 0


class _Recipe(Record):
    name: str | None = None
    base: str | None = None
    training: _Training = _Training()


def require(kind: type[Record], value: dict[str, Any], where: str, mend: str) -> dict[str, Any]:
    """Return the value if it has the keys and types of its kind.

    Raises:
        UnmovedError: it has not; it names ``where``, the key, and how to mend it.
    """
    try:
        kind.model_validate(value)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key, came = (
            ".".join(map(str, first["loc"])),
            "" if first["type"] == "missing" else f", came {first['input']!r:.80}",
        )
        raise UnmovedError(f"{where}: {key}: {first['msg']}{came}; unmoved did not write this: {mend}") from None
    return value


def read(kind: type[Record], path: Path, mend: str) -> dict[str, Any] | None:
    """Read a record of this kind from its file; None if there is none.

    Raises:
        UnmovedError: a file that is no regular one, too large, no JSON, or something else than this kind of record.
    """
    try:
        return require(kind, untrusted.json_file(path), str(path), mend)
    except FileNotFoundError:
        return None


def recipe(path: Path, mend: str) -> dict[str, Any]:
    """Read the tables of a run's recipe and check the types of those that a report reads.

    Raises:
        FileNotFoundError: there is none.
        UnmovedError: as `untrusted.toml_file`.
    """
    return require(_Recipe, untrusted.toml_file(path), str(path), mend)


def log(path: Path, mend: str) -> list[dict[str, Any]]:
    """Read the lines of a training log; none if there is no log.

    Raises:
        UnmovedError: as `read`; more cells than a log of any training has.
    """
    lines, names = _lines(path, MOST_LOG) or [], set[str]()
    for number, line in enumerate(lines, start=1):
        require(Epoch, line, f"{path}: line {number}", mend)
        names.update(_leaves(line))
        if len(lines) * len(names) > MOST_CELLS:
            raise UnmovedError(f"{path}: expected at most {MOST_CELLS} numbers, came more; {mend}")
    return lines


def per_class(path: Path, mend: str) -> list[dict[str, Any]] | None:
    """Read the lines of a training's numbers by class; None if there is no such file.

    Raises:
        UnmovedError: as `log`.
    """
    lines = _lines(path, MOST_PER_CLASS)
    if lines is None:
        return None
    rows, names = 0, set[str]()
    for number, line in enumerate(lines, start=1):
        require(ByClass, line, f"{path}: line {number}", mend)
        for facts in (value for key, value in line.items() if key != "epoch"):
            rows += max(map(len, facts.values()), default=0)
            names.update(facts)
        if rows * (len(names) + 3) > MOST_CELLS:
            raise UnmovedError(f"{path}: expected at most {MOST_CELLS} numbers, came more; {mend}")
    return lines


def _lines(path: Path, most: int) -> list[dict[str, Any]] | None:
    """Read the objects of a file that grows by lines; None if there is none. A last line cut short is left out."""
    try:
        data = untrusted.content(path, most)
    except FileNotFoundError:
        return None
    return untrusted.json_lines(data[: data.rfind(b"\n") + 1], str(path))


def _leaves(line: dict[str, Any], prefix: str = "") -> Iterator[str]:
    """List the columns that a line has in the table."""
    for key, value in line.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key
