"""Write and read a training's log: files that grow by a line per epoch, and that a resumed training truncates.

``metrics.jsonl`` has one record per epoch. Lists with a number for each class, which some terms report, go to
``per_class.jsonl``, so that ``metrics.jsonl`` does not grow with the number of classes.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NotRequired, TypeAlias, TypedDict, final

import pandas as pd

from unmoved.core import files, untrusted

logger = logging.getLogger("unmoved")
METRICS, PER_CLASS = "metrics.jsonl", "per_class.jsonl"
MOST = 2**30  # bytes of a log file that a training can resume from


@final
class StepRecord(TypedDict):
    """Hold the numbers of one training step.

    Attributes:
        epoch: its number, from 0.
        share: of the epoch's steps that are done, in (0, 1].
        loss: the mean of the objective over the batch.
    """

    epoch: int
    share: float
    loss: float


@final
class EpochRecord(TypedDict):
    """Hold the numbers of one epoch: a line of the log.

    Attributes:
        epoch: its number, from 1.
        step: optimizer steps since the training began.
        lr: the learning rate after the epoch.
        eps: the radius of the attack in the last step; None without one.
        loss, train_accuracy, parts: means over the samples, ``parts`` of each term, unweighted.
        validation_clean, validation_robust, validation_n: accuracies in [0, 1] on so many held-out samples.
        validation_chance: accuracy of always predicting the most frequent class of these samples (with several
            processes, of each one's part).
        terms: the numbers that terms report.
        overfitting: a sentence, if catastrophic overfitting was detected in the epoch.
        back_to: the epoch whose weights were restored because of it.
        stopped: whether training ended because of it.
        kept: whether it is the best epoch so far.
        seconds: since the training began, interruptions left out.
    """

    epoch: int
    step: int
    lr: float
    eps: float | None
    loss: float
    train_accuracy: float
    parts: dict[str, float]
    validation_clean: NotRequired[float]
    validation_robust: NotRequired[float]
    validation_chance: NotRequired[float]
    validation_n: NotRequired[int]
    terms: NotRequired[dict[str, Mapping[str, object]]]
    overfitting: NotRequired[str]
    back_to: NotRequired[int]
    stopped: NotRequired[bool]
    kept: NotRequired[bool]
    seconds: NotRequired[float]


Progress: TypeAlias = Callable[[StepRecord | EpochRecord], None]


class FileMark(TypedDict):
    """Hold the length and the checksum of a log file."""

    bytes: int
    sha256: str


Mark: TypeAlias = dict[str, FileMark]  # of each file, by its name
ByClass: TypeAlias = dict[str, dict[str, list[float]]]  # term -> what it reports -> a number for each class


def divided(record: Mapping[str, object]) -> tuple[dict[str, object], ByClass]:
    """Divide an epoch's record into numbers and the lists that its terms report, term by term."""
    terms, lists, rest = record.get("terms"), ByClass(), dict[str, dict[str, object]]()
    if not isinstance(terms, dict):
        return dict(record), {}
    for name, facts in terms.items():
        for key, value in facts.items():
            (lists if isinstance(value, list) else rest).setdefault(name, {})[key] = value
    return {**record, "terms": rest}, lists


def joined(record: EpochRecord, lists: Mapping[str, object]) -> EpochRecord:
    """Join what `divided` has divided; ``lists`` may hold its epoch beside the terms."""
    terms: object = record.get("terms", {})  # may be anything in a damaged log
    if not isinstance(terms, dict):
        return record
    pairs = {name: (terms.get(name, {}), facts) for name, facts in lists.items()}
    merged = {name: a | b for name, (a, b) in pairs.items() if isinstance(a, dict) and isinstance(b, dict)}
    return {**record, "terms": terms | merged} if merged else record


def by_class(lines: Iterable[Mapping[str, Any]]) -> pd.DataFrame:
    """Make a row for each epoch, term and class of ``{"epoch": 1, "term": {"q": [0.5, 0.4], ...}, ...}``."""
    columns: dict[str, list[object]] = {"epoch": [], "term": [], "class": []}
    for line in lines:
        for term, facts in line.items():
            if term == "epoch":
                continue
            before, count = len(columns["epoch"]), max(map(len, facts.values()), default=0)
            rows = facts | {"epoch": [line["epoch"]] * count, "term": [term] * count, "class": list(range(count))}
            for key in rows:
                columns.setdefault(key, [None] * before)
            for key, column in columns.items():
                values = rows.get(key, [])
                column += [*values, *[None] * (count - len(values))]
    return pd.DataFrame(columns)


class Log:
    """Append to the two log files of a run, and truncate them to a saved mark.

    The trainer's state holds a mark of the log (`mark`) and the record of its own epoch, which is appended only after
    the state is saved. So a log that ends with the last epoch shows that the training is complete, and a process that
    is killed between the two writes loses no line.

    Raises:
        UnmovedError: files that cannot be written.
    """

    def __init__(self, folder: Path) -> None:
        self._files = {name: _Lines(folder / name) for name in (METRICS, PER_CLASS)}

    def mark(self) -> Mark:
        """Return the current marks of the files; their content is on disk when this returns."""
        return {name: file.mark() for name, file in self._files.items()}

    def add(self, record: EpochRecord) -> None:
        """Append an epoch's record. A crash of the machine may lose it, which no saved state relies on yet."""
        slim, lists = divided(record)
        # The record comes last: if it is there, so are the numbers by class.
        if lists:
            self._files[PER_CLASS].add({"epoch": record["epoch"], **lists})
        self._files[METRICS].add(slim)

    def records(self, mark: Mark, before: int) -> list[EpochRecord]:
        """Return the records up to a mark, of epochs below ``before``; from a damaged log those that can be read."""
        records, lists = (self._files[name].read(mark[name], before) for name in (METRICS, PER_CLASS))
        by_epoch = {line["epoch"]: line for line in lists}
        return [joined(record, by_epoch.get(record["epoch"], {})) for record in records]

    def go_back(self, mark: Mark | None, before: int) -> None:
        """Truncate the files to a mark, or empty them; damaged ones keep their readable lines, which is logged."""
        for name, file in self._files.items():
            file.go_back(None if mark is None else mark[name], before)


class _Lines:
    """A file of JSON lines, each with its epoch."""

    def __init__(self, path: Path) -> None:
        self.path, self.size, self.digest = path, 0, hashlib.sha256()

    def mark(self) -> FileMark:
        if self.size:
            files.append(self.path, b"")  # synced: so is everything before it
        return {"bytes": self.size, "sha256": self.digest.hexdigest()}

    def add(self, line: Mapping[str, object]) -> None:
        self._take(data := (json.dumps(line) + "\n").encode())
        files.append(self.path, data, synced=False)

    def _take(self, data: bytes) -> None:
        self.digest.update(data)
        self.size += len(data)

    def read(self, mark: FileMark, before: int) -> list[Any]:
        is_intact, data = self._content(mark)
        return [json.loads(line) for line in (data.splitlines() if is_intact else _readable(data, before))]

    def go_back(self, mark: FileMark | None, before: int) -> None:
        is_intact, data = (True, b"") if mark is None else self._content(mark)
        self.size, self.digest = 0, hashlib.sha256()
        if is_intact:
            self._take(data)
            files.cut(self.path, self.size)
            return
        lines = _readable(data, before)
        self._take(b"".join(lines))
        files.write_atomic(self.path, b"".join(lines))
        logger.warning(
            "%s is missing or is not what training wrote: of %d epochs it keeps the %d that can be read; "
            "the weights do not depend on it",
            self.path,
            before - 1,
            len(lines),
        )

    def _content(self, mark: FileMark) -> tuple[bool, bytes]:
        """Return whether the file is as it was at a mark, and its bytes up to there, or all that there are."""
        try:
            data = untrusted.content(self.path, MOST)
        except FileNotFoundError:
            data = b""
        start = data[: mark["bytes"]]
        is_intact = len(start) == mark["bytes"] and hashlib.sha256(start).hexdigest() == mark["sha256"]
        return is_intact, start if is_intact else data


def _readable(data: bytes, before: int) -> list[bytes]:
    """Return the first line of each epoch below ``before``, where it is JSON, in the order of epochs."""
    lines: dict[int, bytes] = {}
    for line in data.split(b"\n"):
        try:
            epoch = json.loads(line)["epoch"]
        except (ValueError, KeyError, TypeError, RecursionError):
            continue
        if isinstance(epoch, int) and not isinstance(epoch, bool) and 1 <= epoch < before:
            lines.setdefault(epoch, line + b"\n")
    return [lines[epoch] for epoch in sorted(lines)]
