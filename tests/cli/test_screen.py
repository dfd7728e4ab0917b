"""What people see while they wait."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from helpers.cli import recipe, unmoved

from unmoved import UnmovedError
from unmoved.cli import grid_watch, screen
from unmoved.cli.grid_watch import GridWatch, epochs_done
from unmoved.experiments import compare

LINE = b'{"epoch": 1, "loss": 2.0}\n'


def job(path: Path, log: bytes) -> Any:
    path.mkdir(parents=True, exist_ok=True)
    (path / "metrics.jsonl").write_bytes(log)
    return SimpleNamespace(path=str(path), epochs=4)


def test_epochs_done_are_the_whole_lines_of_the_log(tmp_path: Path) -> None:
    """A torn last line, also one torn inside a character, is an epoch that is not done."""
    assert epochs_done(job(tmp_path / "done", 3 * LINE)) == 3
    for torn in (LINE[:9], '{"epoch": "\u00e9'.encode()[:-1], b"\x00"):
        assert epochs_done(job(tmp_path / "torn", 2 * LINE + torn)) == 2
        assert epochs_done(job(tmp_path / "torn", torn)) == 0
    assert epochs_done(job(tmp_path / "begun", b"")) == 0
    assert epochs_done(SimpleNamespace(path=str(tmp_path / "waiting"), epochs=4)) == 0


def test_the_time_left_is_that_of_the_work_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Work at a steady pace, on top of a run that was there: the estimate is exact, and there is none before."""
    clock = [50.0]
    monkeypatch.setattr(grid_watch.time, "monotonic", lambda: clock[0])
    jobs = [job(tmp_path / "before", 4 * LINE), job(tmp_path / "one", b""), job(tmp_path / "two", b"")]
    watch = GridWatch(jobs)
    assert watch.look()[1] == "4 of 12 epochs, 0 of 3 runs"
    clock[0] += 30  # the processes start
    job(tmp_path / "one", LINE)
    assert watch.look()[1] == "5 of 12 epochs, 0 of 3 runs"
    job(tmp_path / "one", 3 * LINE)
    clock[0] += 20 * (1 - grid_watch.JUDGING)  # 10 s an epoch, judging included
    reads = Counter[str]()
    monkeypatch.setattr(grid_watch, "epochs_done", lambda job: reads.update([job.path]) or epochs_done(job))
    share, words = watch.look()
    assert set(reads.values()) == {1}
    assert share == pytest.approx((1 - grid_watch.JUDGING) * 7 / 12)
    # 10 (12 - 7 (1 - JUDGING)) = 71 s, up to whole tens
    assert words == "7 of 12 epochs, 0 of 3 runs, about 1 min 20 s left"
    watch.ended = {one.path for one in jobs}
    assert watch.look() == (1.0, "7 of 12 epochs, 3 of 3 runs")


def test_the_bar_of_a_comparison_says_epochs_and_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    advanced: list[tuple[float, str | None]] = []

    @contextmanager
    def bars(*, timed: bool) -> Iterator[Any]:
        yield lambda label, total: lambda done, words: advanced.append((done / total, words))

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
    share = 3 / 4 * (1 - grid_watch.JUDGING)
    assert advanced == [(0.0, "0 of 4 epochs, 0 of 2 runs"), (pytest.approx(share), "3 of 4 epochs, 0 of 2 runs")]
