"""What people see while they wait."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from helpers.cli import recipe, unmoved

from unmoved import UnmovedError
from unmoved.cli import screen
from unmoved.experiments import compare

LINE = b'{"epoch": 1, "loss": 2.0}\n'


def job(path: Path, log: bytes) -> Any:
    path.mkdir(parents=True, exist_ok=True)
    (path / "metrics.jsonl").write_bytes(log)
    return SimpleNamespace(path=str(path))


def test_epochs_done_are_the_whole_lines_of_the_log(tmp_path: Path) -> None:
    """A torn last line, also one torn inside a character, is an epoch that is not done."""
    assert screen.epochs_done(job(tmp_path / "done", 3 * LINE)) == 3
    for torn in (LINE[:9], '{"epoch": "\u00e9'.encode()[:-1], b"\x00"):
        assert screen.epochs_done(job(tmp_path / "torn", 2 * LINE + torn)) == 2
        assert screen.epochs_done(job(tmp_path / "torn", torn)) == 0
    assert screen.epochs_done(job(tmp_path / "begun", b"")) == 0
    assert screen.epochs_done(SimpleNamespace(path=str(tmp_path / "waiting"))) == 0


def test_the_bar_of_a_comparison_is_at_the_sum_of_its_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    totals: list[float] = []
    advanced: list[float] = []

    @contextmanager
    def bars() -> Iterator[Any]:
        def add(label: str, total: float) -> screen.Advance:
            totals.append(total)
            return advanced.append

        yield add

    def trains(jobs: Any, *, poll: Any, **settings: Any) -> None:
        poll()
        for one, log in zip(jobs, (LINE, 2 * LINE + LINE[:5]), strict=True):
            job(Path(one.path), log)
        poll()
        raise UnmovedError("enough")

    monkeypatch.setattr(screen, "bars", bars)
    monkeypatch.setattr(compare, "compare", trains)
    said = unmoved("compare", recipe(tmp_path), "--seeds", "0,1", "--out", tmp_path / "out")
    assert said.mistake() == "enough"
    assert (totals, advanced) == ([4], [0, 3])
