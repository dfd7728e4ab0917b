"""What was computed before an interruption is read back, and nothing else is."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from unmoved.core.errors import UnmovedError
from unmoved.evaluation.journal import Journal

QUESTION = {"weights": "abc", "attacks": {"a": "A()"}}


def chunk(first: int, count: int = 3) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return np.arange(first, first + count), np.arange(count) % 2, np.full(count, 0.1) / 3


def written(path: Path, chunks: int = 2) -> Path:
    journal = Journal(path, QUESTION)
    for k in range(chunks):
        journal.add("a", "part", *chunk(10 * k))
    return path


def test_answers_come_back_bit_for_bit(tmp_path: Path) -> None:
    journal = Journal(written(tmp_path / "deep" / "j.jsonl"), QUESTION)
    for came, expected in zip(
        journal.read("a", "part"), map(np.concatenate, zip(chunk(0), chunk(10), strict=True)), strict=True
    ):
        assert came.dtype == expected.dtype
        assert np.array_equal(came, expected)
    assert [len(part) for part in journal.read("a", "other")] == [0, 0, 0]


def test_another_question_starts_anew(tmp_path: Path) -> None:
    path = written(tmp_path / "j.jsonl")
    assert len(Journal(path, {**QUESTION, "weights": "abd"}).read("a", "part")[0]) == 0
    assert not path.exists()


@pytest.mark.parametrize("kept", [0.3, 0.6, 0.95])
def test_a_torn_end_costs_the_torn_chunk_alone(tmp_path: Path, kept: float) -> None:
    path = written(tmp_path / "j.jsonl", chunks=4)
    whole = path.read_bytes()
    cut = whole[: int(len(whole) * kept)]
    path.write_bytes(cut)
    lines = cut.count(b"\n") - 1
    journal = Journal(path, QUESTION)
    assert len(journal.read("a", "part")[0]) == 3 * max(lines, 0)
    journal.add("a", "part", *chunk(90))
    assert Journal(path, QUESTION).read("a", "part")[0].tolist()[-3:] == [90, 91, 92]


@pytest.mark.parametrize(
    "line", [b"nonsense\n", b'{"attack": "a"}\n', b'{"attack": "a", "part": "part", "position": [1]}\n']
)
def test_a_bad_line_and_what_follows_are_computed_again(tmp_path: Path, line: bytes) -> None:
    path = written(tmp_path / "j.jsonl", chunks=1)
    path.write_bytes(path.read_bytes() + line)
    Journal(tmp_path / "other", QUESTION).add("a", "part", *chunk(50))
    path.write_bytes(path.read_bytes() + (tmp_path / "other").read_bytes().split(b"\n", 1)[1])
    assert Journal(path, QUESTION).read("a", "part")[0].tolist() == [0, 1, 2]


def test_what_cannot_be_read_is_said(tmp_path: Path) -> None:
    (tmp_path / "j").write_bytes(b"\xff\xfe")
    with pytest.raises(UnmovedError, match="delete it to start"):
        Journal(tmp_path / "j", QUESTION)


def test_close_leaves_nothing(tmp_path: Path) -> None:
    path = written(tmp_path / "j.jsonl")
    Journal(path, QUESTION).close()
    assert not path.exists()
