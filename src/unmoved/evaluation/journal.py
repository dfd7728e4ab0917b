"""Record the results of a long evaluation chunk by chunk, so that an interruption costs one chunk and no more."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Self

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, NonNegativeFloat, model_validator

from unmoved.core import untrusted
from unmoved.core.errors import UnmovedError
from unmoved.core.files import append, write_atomic

MOST_JOURNAL = 2**28  # bytes: five million results
Answers = tuple[np.ndarray, np.ndarray, np.ndarray]
_Whole = Annotated[int, Field(ge=0, lt=2**63)]


class _Entry(BaseModel):
    """One line of the file: what one part of an attack achieved on a chunk of samples."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)

    attack: str
    part: str
    position: Annotated[list[_Whole], Field(min_length=1)]
    prediction: list[_Whole]
    distance: list[NonNegativeFloat]

    @model_validator(mode="after")
    def _is_one_answer_a_sample(self) -> Self:
        if not len(set(self.position)) == len(self.position) == len(self.prediction) == len(self.distance):
            raise ValueError("expected as many predictions and distances as positions, which differ")
        return self

    def answers(self) -> Answers:
        return np.array(self.position, np.int64), np.array(self.prediction, np.int64), np.array(self.distance)


class Journal:
    """Keep one line per finished chunk of samples, in a file that belongs to one model, data and attacks.

    Args:
        path: the file; made when the first results come.
        question: what the results depend on (weights, attacks, data, versions). Results of another one are discarded.

    Raises:
        UnmovedError: a file that cannot be read or written.
    """

    def __init__(self, path: Path, question: Mapping[str, object]) -> None:
        self.path = path
        self._head = json.dumps({"question": question}, sort_keys=True)
        self._answers: dict[tuple[str, str], list[Answers]] = {}
        self._load()

    def _load(self) -> None:
        try:
            lines = untrusted.content(self.path, MOST_JOURNAL).decode().split("\n")
        except FileNotFoundError:
            return
        except (UnmovedError, UnicodeDecodeError) as error:
            raise UnmovedError(f"{self.path}: {error}; delete it to start the evaluation anew") from error
        if lines[0] != self._head:
            self.path.unlink(missing_ok=True)
            return
        good = [self._head]
        for line in lines[1:-1]:  # the part after the last line end was cut off by the interruption
            try:
                entry = _Entry.model_validate_json(line)
            except ValueError:
                break  # a bad line: this chunk and the later ones are computed again
            self._answers.setdefault((entry.attack, entry.part), []).append(entry.answers())
            good.append(line)
        if good != lines[:-1] or lines[-1]:
            write_atomic(self.path, ("\n".join(good) + "\n").encode())

    def read(self, attack: str, part: str) -> Answers:
        """Return (positions, predictions, distances) of the samples that this part of this attack was run on."""
        empty = np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0)
        chunks = self._answers.get((attack, part), [empty])
        position, prediction, distance = (np.concatenate(column) for column in zip(*chunks, strict=True))
        return position, prediction, distance

    def add(self, attack: str, part: str, position: np.ndarray, prediction: np.ndarray, distance: np.ndarray) -> None:
        """Write a chunk's results; they are on disk when this returns."""
        line = json.dumps(
            {
                "attack": attack,
                "part": part,
                "position": position.tolist(),
                "prediction": prediction.tolist(),
                "distance": distance.tolist(),
            }
        )
        head = "" if self.path.exists() else self._head + "\n"
        append(self.path, (head + line + "\n").encode())

    def close(self) -> None:
        """Remove the journal once the evaluation is saved."""
        self.path.unlink(missing_ok=True)
