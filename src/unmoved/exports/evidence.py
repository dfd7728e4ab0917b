"""Write and read ``evidence.json``: what was tried on a model, on which data, by which versions, with which result.

Its schema is generated from the classes of this file (`schema`); docs/evidence.md says how to read it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from unmoved.core import untrusted
from unmoved.core.errors import UnmovedError
from unmoved.core.files import latest
from unmoved.exports.exported_run import ExportedRun, Judgement, Kind, Version, as_json
from unmoved.exports.robustbench import architecture
from unmoved.runs.records import digest_of_outcomes

FORMAT = 1
FILE = "evidence.json"
EMPTY = "0" * 64  # stands in the place of the file's own hash while that is computed
RUN_FILES = ("recipe.toml", "provenance.json", "metrics.jsonl", "doctor.json")
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
Share = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=0)]
Versions = dict[str, str | None]


class Table(BaseModel):
    """An object of the file."""

    model_config = ConfigDict(extra="forbid")


class FileRecord(Table):
    """A file of the export."""

    sha256: Sha256
    bytes: Count


class ProgramRecord(Table):
    """What wrote the file, and when."""

    unmoved: str
    written: str = Field(description="ISO 8601, UTC")


class ModelRecord(Table):
    """The model that was judged."""

    name: str
    file: str = Field(description="the file of the export that holds the weights")
    sha256: Sha256 = Field(description="of that file: the evaluations below are of exactly these bytes")
    weights: Literal["best", "last"] = Field(
        description="best by validation robust accuracy, or those of the last epoch"
    )
    architecture: str
    shape: list[int] | None = Field(description="channels, height and width of an image; null where no file says it")
    classes: list[str]
    trained_by_unmoved: bool = Field(description="false where a model that was trained elsewhere was judged")
    training_seed: int | None


class BallRecord(Table):
    """What the attacker may do: move each image within a ball and within the valid images."""

    norm: str
    eps: float = Field(description="on images in [0, 1]")
    bounds: tuple[float, float]


class ImagesRecord(Table):
    """The images that a model was judged on."""

    split: str
    n: Count
    asked_n: int | None = Field(description="how many were asked for; null for all")
    sha256: str | None = Field(description="of their pixels and labels in order; null where an older version judged")


class AttackRecord(Table):
    """An attack, as it was run."""

    name: str
    settings: str = Field(description="the constructor call that makes it, its seed too")
    kinds: dict[str, str] = Field(
        description="of each of its parts: gradients, fixed-step gradients, queries, transfer"
    )
    autoattack: Version | None = Field(
        description="the version of AutoAttack that it is; null for any other attack, whatever its name"
    )


class ResultRecord(Table):
    """A share of the images that the model gets right, with Wilson's 95 % interval over images."""

    measure: str = Field(description="clean, an attack's name, or worst case: right under all attacks")
    eps: float
    correct: Count
    n: Count
    accuracy: Share = Field(description="correct / n; under attack an upper bound")
    low: Share
    high: Share


class EstimateRecord(Table):
    """What an attack, asked about a sample of what those of the judgement left, leaves together with them.

    A figure of it is quoted with an interval, and never as a verdict of the attack.
    """

    method: Literal["sampled"]
    attack: AttackRecord
    n: Count
    survivors: Count = Field(description="images that the attacks of the judgement left robust")
    near: Count = Field(description="the survivors nearest to breaking, all of which were asked about")
    near_broken: Count
    far_asked: Count = Field(description="how many of the other survivors were drawn at random and asked about")
    far_broken: Count
    error: Share = Field(description="the probability with which an interval may miss the truth, over draws")
    accuracy: Share = Field(
        description="(survivors - near_broken - far_broken (survivors - near) / far_asked) / n; of an upper bound"
    )
    of_these_images: tuple[Share, Share] = Field(description="the interval for the share left of these n images")
    of_all_images: tuple[Share, Share] = Field(description="that for all images of the same distribution")


class JudgementRecord(Table):
    """An evaluation of the model."""

    kind: Kind = Field(
        description="by any attacks; by AutoAttack; by a cheap search whose survivors AutoAttack was asked about a "
        "sample of; on images held out of training, to choose settings by"
    )
    asked: str | None = Field(description="the attacks as they were asked for")
    attacks: list[AttackRecord]
    images: ImagesRecord
    threat: BallRecord
    precision: str | None = Field(description="of the search alone; every success is judged in float32")
    seconds: float | None
    finished: str | None = Field(description="ISO 8601, UTC; null where an older version judged")
    versions: Versions = Field(description="of the packages that judged; empty where an older version judged")
    notes: list[str]
    results: list[ResultRecord]
    estimate: EstimateRecord | None = Field(description="of AutoAttack, where it was asked about a sample; else null")
    files: dict[str, Sha256] = Field(description="of the run folder: the tables that the results are counted from")


class FindingRecord(Table):
    """A reason not to believe a robust accuracy."""

    check: str
    grade: Literal["do not believe", "look closer", "note"]
    measured: str
    why: str
    do: str


class DoctorRecord(Table):
    """What the doctor said of the model and of one of the judgements."""

    about: Kind | None = Field(description="the judgement whose outcomes it read")
    n: int | None
    sentence: str = Field(description="to stand beside the number; empty where nothing objects")
    findings: list[FindingRecord]


class Evidence(Table):
    """What was tried on a model, on which data by hash, by which versions, with which result; every file's hash."""

    format: Literal[1]
    sha256: Sha256 = Field(description=f"of this file's bytes with {EMPTY[:4]}...0 (64 zeros) in place of this value")
    program: ProgramRecord
    model: ModelRecord
    judgements: list[JudgementRecord]
    doctor: DoctorRecord | None = Field(description="null where the doctor was not asked about these outcomes")
    about: dict[str, str] = Field(description="what the user said of the model: license, title, authors, link, venue")
    left_out: list[str] = Field(description="what the run folder also holds, about other weights or outcomes")
    recipe: dict[str, Any] = Field(description="the fully resolved recipe")
    provenance: dict[str, Any] = Field(description="where the run folder was made: command, versions, hardware, git")
    run_files: dict[str, Sha256] = Field(description="of the run folder, as far as there are")
    files: dict[str, FileRecord] = Field(description="of the export, all but this one")


def schema() -> dict[str, Any]:
    """Return the JSON schema of ``evidence.json``."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **Evidence.model_json_schema()}


def evidence(exported: ExportedRun, weights: str, files: Mapping[str, bytes]) -> bytes:
    """Return the content of ``evidence.json``.

    Args:
        weights: the name of the file of weights.
        files: all other files of the export.
    """
    run = exported.evaluated.path
    told = Evidence(
        format=FORMAT,
        sha256=EMPTY,
        program=ProgramRecord(
            unmoved=metadata.version("unmoved"), written=datetime.now(UTC).isoformat(timespec="seconds")
        ),
        model=ModelRecord(
            name=exported.name,
            file=weights,
            sha256=exported.sha256,
            weights=exported.weights,
            architecture=architecture(exported),
            shape=None if exported.shape is None else list(exported.shape),
            classes=exported.classes,
            trained_by_unmoved=exported.trained,
            training_seed=exported.evaluated.seed if exported.trained else None,
        ),
        judgements=[_judgement(judgement, run) for judgement in exported.judgements],
        doctor=_opinion(exported),
        about=dict(exported.about),
        left_out=list(exported.left_out),
        recipe=as_json(exported.recipe),
        provenance=as_json(exported.evaluated.provenance),
        run_files={name: untrusted.digest(path) for name in RUN_FILES if (path := run / name).is_file()},
        files={n: FileRecord(sha256=hashlib.sha256(d).hexdigest(), bytes=len(d)) for n, d in sorted(files.items())},
    )
    data = (json.dumps(told.model_dump(), indent=2, allow_nan=False) + "\n").encode()
    return data.replace(EMPTY.encode(), own_sha256(data).encode(), 1)


def own_sha256(data: bytes, said: str = EMPTY) -> str:
    """Compute the hash that ``evidence.json`` carries: of its bytes with zeros in place of ``said``, the first time."""
    return hashlib.sha256(data.replace(said.encode(), EMPTY.encode(), 1)).hexdigest()


def _judgement(judgement: Judgement, run: Path) -> JudgementRecord:
    facts, kind = judgement.facts, judgement.kind
    attacks = [
        AttackRecord(
            name=result.measure,
            settings=judgement.settings(result.measure),
            kinds=facts.get("kinds", {}).get(result.measure, {}),
            autoattack=judgement.autoattack(result.measure),
        )
        for result in judgement.attacked
    ]
    told = untrusted.digest(latest(run / kind, kind, f"{kind}.json"))
    return JudgementRecord(
        kind=kind,
        asked=facts.get("asked"),
        attacks=attacks,
        images=ImagesRecord(
            split=judgement.split, n=judgement.clean.n, asked_n=facts.get("asked_n"), sha256=facts.get("images")
        ),
        threat=BallRecord(norm=judgement.norm, eps=judgement.eps, bounds=(0.0, 1.0)),
        precision=facts.get("precision"),
        seconds=facts.get("seconds"),
        finished=facts.get("finished"),
        versions=facts.get("versions", {}),
        notes=facts.get("notes", []),
        results=[ResultRecord(**result._asdict()) for result in judgement.results],
        estimate=_estimate(judgement),
        files={f"{kind}/{name}": digest for name, digest in {f"{kind}.json": told, **facts.get("files", {})}.items()},
    )


def _estimate(judgement: Judgement) -> EstimateRecord | None:
    estimate, sample = judgement.estimate, judgement.facts.get("sample")
    if estimate is None or sample is None:
        return None
    attack = AttackRecord(name="autoattack", settings=judgement.sampling, kinds=sample["kinds"], autoattack="standard")
    low, high = estimate.interval
    return EstimateRecord(
        method="sampled",
        attack=attack,
        **asdict(estimate),
        accuracy=estimate.left / estimate.n,
        of_these_images=(low / estimate.n, high / estimate.n),
        of_all_images=estimate.population,
    )


def _opinion(exported: ExportedRun) -> DoctorRecord | None:
    doctor = exported.doctor
    if doctor is None:
        return None
    read = doctor.get("evaluation")
    about = next((j.kind for j in exported.tested if digest_of_outcomes(j.facts) == read), None)
    return DoctorRecord(
        about=about,
        n=doctor.get("n"),
        sentence=doctor.get("sentence", ""),
        findings=[
            FindingRecord(check=f["check"], grade=f["grade"], measured=f["measured"], why=f["why"], do=f["do"])
            for f in doctor["findings"]
        ],
    )


class Listing(BaseModel):
    """What `verify` reads of ``evidence.json``, whatever version wrote it."""

    model_config = ConfigDict(strict=True, extra="allow")

    format: Literal[1]
    sha256: Sha256
    program: ProgramRecord
    files: dict[str, FileRecord]


def listing(data: bytes, where: str) -> Listing:
    """Read which files an export has.

    Raises:
        UnmovedError: no JSON, or not what `evidence` writes.
    """
    try:
        return Listing.model_validate(untrusted.json_object(data, where))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(map(str, first["loc"]))
        raise UnmovedError(f"{where}: {key}: {first['msg']}; `unmoved export` did not write this") from None
