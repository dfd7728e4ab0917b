"""Record the results of a long evaluation chunk by chunk, so that an interruption costs one chunk and no more."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from unmoved.core import untrusted
from unmoved.core.errors import UnmovedError
from unmoved.core.files import append, write_atomic

MOST_JOURNAL = 2**28  # bytes: five million answers
Answers = tuple[np.ndarray, np.ndarray, np.ndarray]


class Journal:
    """Keep one line per finished chunk of samples, in a file that belongs to one model, data and attacks.

    Args:
        path: the file; made when the first answers come.
        question: what is asked (weights, attacks, data, versions). Answers to another question are thrown away.

    Raises:
        UnmovedError: a file that cannot be read or written.
    """

    def __init__(self, path: Path, question: dict[str, Any]) -> None:
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
        whole = [self._head]
        for line in lines[1:-1]:  # what follows the last line end was torn by the interruption
            try:
                entry = json.loads(line)
                answers = _answers(entry)
                key = (str(entry["attack"]), str(entry["part"]))
            except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
                break  # a bad line: it and what follows are computed again
            self._answers.setdefault(key, []).append(answers)
            whole.append(line)
        if whole != lines[:-1] or lines[-1]:
            write_atomic(self.path, ("\n".join(whole) + "\n").encode())

    def read(self, attack: str, part: str) -> Answers:
        """Return (positions, predictions, distances) of the samples that this part of this attack was run on."""
        found = self._answers.get((attack, part), [])
        empty = np.zeros(0, dtype=np.int64)
        if not found:
            return empty, empty, np.zeros(0)
        position, prediction, distance = (np.concatenate(column) for column in zip(*found, strict=True))
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


def _answers(entry: dict[str, Any]) -> Answers:
    """Parse a line to (positions, predictions, distances); ValueError if `Journal.add` did not write it."""
    names = ("position", "prediction", "distance")
    position, prediction, distance = (np.array(entry[name]) for name in names)
    whole = position.dtype == prediction.dtype == np.int64 and distance.dtype == np.float64
    if not whole or not position.shape == prediction.shape == distance.shape == (len(position),):
        raise ValueError("expected as many positions, predictions and distances")
    if len(set(position.tolist())) < len(position) or min(position.min(), prediction.min()) < 0:
        raise ValueError("expected different positions, and predictions of 0 or more")
    if not (np.isfinite(distance) & (distance >= 0)).all():
        raise ValueError("expected distances of 0 or more")
    return position, prediction, distance
