"""A cached table is made once, comes back bit for bit, and is never returned for another key."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from pandas.testing import assert_frame_equal

from unmoved.analyses.studies.table_cache import TableCache

TABLE = pd.DataFrame(
    {"x": [0.1, 1 / 3, np.nan], "k": [1, -2, 3], "right": [True, False, True], "name": ["a,b", 'say "x"', "# z"]}
)


class Counting:
    def __init__(self) -> None:
        self.calls = 0

    def __call__(self) -> pd.DataFrame:
        self.calls += 1
        return TABLE


def test_a_table_is_made_once_and_comes_back_bit_for_bit(tmp_path: Path) -> None:
    make = Counting()
    for _ in range(3):
        assert_frame_equal(TableCache(tmp_path / "s").table("t", {"n": 1}, make), TABLE, check_exact=True)
    assert make.calls == 1


def test_another_question_has_another_table(tmp_path: Path) -> None:
    make = Counting()
    for question in ({"n": 1}, {"n": 2}, {"n": 1, "m": None}, {"n": 1}):
        TableCache(tmp_path).table("t", question, make)
    assert make.calls == 3


@pytest.mark.parametrize("harm", ["cut", "flip", "empty", "binary", "foreign"])
def test_a_torn_or_changed_file_is_made_again(tmp_path: Path, harm: str) -> None:
    make = Counting()
    cache = TableCache(tmp_path)
    cache.table("t", {"n": 1}, make)
    (path,) = tmp_path.iterdir()
    data = path.read_bytes()
    where = data.index(b"-2")
    path.write_bytes(
        {
            "cut": data[:-9],
            "flip": data[:where] + b"-3" + data[where + 2 :],
            "empty": b"",
            "binary": b"\xff\xfe" + data,
            "foreign": data.replace(b'n\\": 1', b'n\\": 7'),
        }[harm]
    )
    assert_frame_equal(cache.table("t", {"n": 1}, make), TABLE)
    assert make.calls == 2
    assert path.read_bytes() == data


def test_what_fails_leaves_nothing(tmp_path: Path) -> None:
    def fails() -> pd.DataFrame:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        TableCache(tmp_path).table("t", {}, fails)
    assert list(tmp_path.iterdir()) == []
