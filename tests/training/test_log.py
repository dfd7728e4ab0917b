"""The log: a line an epoch at the end of a file, cut back to where a state was saved, and told where it was damaged."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from helpers.cli import RECIPE, interrupted, recipe, unmoved

from unmoved.core import files as disk
from unmoved.core.errors import UnmovedError
from unmoved.runs.folder import Run
from unmoved.training.log import METRICS, PER_CLASS, Log, by_class, divided, joined

CLASSES = 7


def record(epoch: int, classes: int = CLASSES) -> dict[str, Any]:
    facts = {"q": [epoch + k / 8 for k in range(classes)], "p_adv_mean": [0.5] * classes, "gap": 0.25 * epoch}
    return {"epoch": epoch, "loss": 1 / epoch, "seconds": float(epoch), "terms": {"global_probability": facts}}


def begun(folder: Path, epochs: int) -> Log:
    log = Log(folder)
    for epoch in range(1, epochs + 1):
        log.add(record(epoch))
    return log


def files(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in (METRICS, PER_CLASS)}


@pytest.mark.parametrize("epochs", [1, 10, 100])
def test_an_epoch_writes_its_own_record_and_nothing_of_those_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, epochs: int
) -> None:
    log, written = begun(tmp_path, epochs), list[int]()
    real = disk.append
    monkeypatch.setattr(disk, "append", lambda path, data, **how: (written.append(len(data)), real(path, data, **how)))
    log.add(record(epochs + 1))
    log.mark()
    assert sum(written) < len(json.dumps(record(epochs + 1))) + 100
    for name, lines in files(tmp_path).items():
        assert lines.count(b"\n") == epochs + 1, name


@pytest.mark.parametrize("classes", [2, 100, 1000])
def test_the_log_does_not_grow_with_the_classes(tmp_path: Path, classes: int) -> None:
    log = Log(tmp_path)
    log.add(record(1, classes))
    assert len((tmp_path / METRICS).read_bytes()) < 120
    (line,) = map(json.loads, (tmp_path / METRICS).read_text().splitlines())
    assert line == record(1) | {"terms": {"global_probability": {"gap": 0.25}}}
    table = Run(tmp_path).per_class
    assert table["q"].tolist() == record(1, classes)["terms"]["global_probability"]["q"]


def test_numbers_by_class_are_a_table_of_epoch_term_and_class() -> None:
    """Terms that report different things, of different numbers of classes, from another epoch on."""
    lines = [{"epoch": 1, "a": {"q": [0.5, 0.25]}}, {"epoch": 2, "a": {"q": [1.0], "p": [0.1, 0.2]}, "b": {"n": [3]}}]
    nan = float("nan")
    rows = [
        (1, "a", 0, 0.50, nan, nan),
        (1, "a", 1, 0.25, nan, nan),
        (2, "a", 0, 1.00, 0.1, nan),
        (2, "a", 1, nan, 0.2, nan),
        (2, "b", 0, nan, nan, 3.0),
    ]
    expected = pd.DataFrame(rows, columns=["epoch", "term", "class", "q", "p", "n"])
    pd.testing.assert_frame_equal(by_class(lines), expected)
    assert by_class([]).columns.tolist() == ["epoch", "term", "class"]
    for whole in (
        record(1),
        {"epoch": 1},
        {"epoch": 1, "terms": {}},
        {"epoch": 1, "terms": {"a": {"x": [1.0]}, "b": {"y": 2.0}}},
    ):
        assert joined(*divided(whole)) == whole
    assert divided({"epoch": 1}) == ({"epoch": 1}, {})
    assert divided({"epoch": 1, "terms": {}}) == ({"epoch": 1, "terms": {}}, {})


def test_a_log_of_an_older_version_has_its_table(tmp_path: Path) -> None:
    """It kept the lists in the log itself."""
    begun(tmp_path / "new", 3)
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / METRICS).write_text("".join(json.dumps(record(k)) + "\n" for k in (1, 2, 3)))
    old, new = Run(tmp_path / "old"), Run(tmp_path / "new")
    pd.testing.assert_frame_equal(old.per_class, new.per_class)
    assert len(new.per_class) == 3 * CLASSES
    assert old.metrics["terms.global_probability.q"].iloc[-1] == record(3)["terms"]["global_probability"]["q"]


def test_what_a_kill_left_of_a_line_is_not_read(tmp_path: Path) -> None:
    begun(tmp_path, 2)
    whole = files(tmp_path)
    begun(tmp_path / "more", 3)
    for name, data in files(tmp_path / "more").items():
        for length in range(len(whole[name]), len(data)):
            (tmp_path / name).write_bytes(data[:length])
            assert Run(tmp_path).metrics["epoch"].tolist() == [1, 2]
            assert Run(tmp_path).per_class["epoch"].max() == 2


@pytest.mark.parametrize("more", [0, 1, 3])
@pytest.mark.parametrize("torn", [b"", b'{"epoch": 9, "lo'])
def test_what_was_logged_after_a_mark_is_cut_off(
    tmp_path: Path, more: int, torn: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    log = begun(tmp_path, 2)
    mark, expected = log.mark(), files(tmp_path)
    for epoch in range(3, 3 + more):
        log.add(record(epoch))
    for name in expected:
        disk.append(tmp_path / name, torn)
    again = Log(tmp_path)  # another process
    assert again.records(mark, 3) == [record(k) for k in (1, 2)]
    again.go_back(mark, 3)
    assert files(tmp_path) == expected
    assert again.mark() == mark
    again.add(record(3))
    begun(tmp_path / "undisturbed", 3)
    assert files(tmp_path) == files(tmp_path / "undisturbed")
    assert caplog.messages == []


def test_without_a_state_a_log_begins_anew(tmp_path: Path) -> None:
    log = begun(tmp_path, 2)
    log.go_back(None, 1)
    log.add(record(1))
    begun(tmp_path / "one", 1)
    assert files(tmp_path) == files(tmp_path / "one")


DAMAGE: dict[str, tuple[Callable[[list[bytes]], list[bytes]], list[int]]] = {
    "empty": (lambda lines: [], []),
    "no JSON": (lambda lines: [lines[0], b"x\n", *lines[2:]], [1, 3, 4]),
    "the first lost": (lambda lines: lines[2:], [3, 4]),
    "torn": (lambda lines: [*lines[:3], lines[3][:-3]], [1, 2, 3]),
    "another order": (lambda lines: [lines[k] for k in (2, 0, 0, 3, 1)], [1, 2, 3, 4]),
    "changed": (lambda lines: [line.replace(b"0.5", b"0.6") for line in lines], [1, 2, 3, 4]),
    "nested": (lambda lines: [b"[" * 100_000 + b"\n", *lines], [1, 2, 3, 4]),
    "of later epochs": (lambda lines: [lines[0].replace(b'"epoch": 1', b'"epoch": 5'), *lines[1:]], [2, 3, 4]),
}


@pytest.mark.parametrize("name", [METRICS, PER_CLASS])
@pytest.mark.parametrize("how", DAMAGE)
def test_a_damaged_log_is_told_and_keeps_what_can_be_read(
    tmp_path: Path, name: str, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    log, (damage, left) = begun(tmp_path, 4), DAMAGE[how]
    mark, before = log.mark(), files(tmp_path)
    (tmp_path / name).write_bytes(b"".join(damage(before[name].splitlines(keepends=True))))
    again = Log(tmp_path)
    assert [line["epoch"] for line in again.records(mark, 5)] == (left if name == METRICS else [1, 2, 3, 4])
    again.go_back(mark, 5)
    assert [json.loads(line)["epoch"] for line in (tmp_path / name).read_bytes().splitlines()] == left
    ((logger, level, note),) = caplog.record_tuples
    assert (logger, level) == ("unmoved", logging.WARNING)
    told = f"{tmp_path / name} is missing or is not what training wrote: of 4 epochs it keeps the {len(left)} that"
    assert note.startswith(told)
    again.add(record(5))
    assert Run(tmp_path).metrics["epoch"].iloc[-1] == Run(tmp_path).per_class["epoch"].iloc[-1] == 5
    assert Log(tmp_path).records(again.mark(), 6)[-1]["epoch"] == 5


def test_a_stranger_may_not_make_a_table_of_other_things(tmp_path: Path) -> None:
    begun(tmp_path, 1)
    for line in ('{"epoch": 0}', '{"epoch": 1, "a": 3}', '{"epoch": 1, "a": {"q": 1}}', "[1]", '{"a": {"q": [1]}}'):
        (tmp_path / PER_CLASS).write_text(line + "\n")
        with pytest.raises(UnmovedError, match=r"per_class\.jsonl: line 1: .*"):
            _ = Run(tmp_path).per_class
    (tmp_path / PER_CLASS).unlink()
    os.mkfifo(tmp_path / PER_CLASS)
    with pytest.raises(UnmovedError, match="a named pipe"):
        _ = Run(tmp_path).per_class


# --- in a training

PROBSCUT = (
    RECIPE.replace("epochs = 2", "epochs = 4").replace("hidden = [16]", "hidden = [4]")
    + "\n[objective.global_probability]\n"
)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("trained")
    path = recipe(folder, PROBSCUT)
    unmoved("train", path, "--out", folder / "run").fine()
    return path, folder / "run"


def no_clock(folder: Path) -> tuple[pd.DataFrame, bytes]:
    return Run.open(folder).metrics.drop(columns="seconds"), (folder / PER_CLASS).read_bytes()


def test_a_training_has_its_numbers_by_class(trained: tuple[Path, Path]) -> None:
    run = Run.open(trained[1])
    table = run.per_class
    assert table.groupby("epoch")["class"].apply(list).tolist() == [list(range(10))] * 4
    assert {"q", "p_adv_mean", "p_adv_variance"} <= set(table)
    assert table["q"].between(0, 1).all()
    assert not any("terms" in name for name in run.metrics)


def test_a_finished_run_is_known_by_its_log_alone(
    trained: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing in the trainer's state is looked at: it may be gone."""
    run = Path(shutil.copytree(trained[1], tmp_path / "run"))
    for state in run.glob("trainer*"):
        state.unlink()
    monkeypatch.setattr(Run, "load_state", None)
    assert "epoch" not in unmoved("train", trained[0], "--out", run, "--resume").fine().out


@pytest.mark.parametrize(("name", "how"), [(METRICS, "torn"), (METRICS, "changed"), (PER_CLASS, "missing")])
def test_a_training_whose_log_is_damaged_says_so_and_ends_in_the_same_weights(
    trained: tuple[Path, Path], tmp_path: Path, name: str, how: str
) -> None:
    path, finished = trained
    run = tmp_path / "run"
    interrupted(path, run, saves=3)
    file = run / name
    if how == "missing":
        file.unlink()
    elif how == "torn":
        file.write_bytes(file.read_bytes()[:-20])
    else:
        file.write_bytes(file.read_bytes().replace(b'{"epoch": 1,', b'{"epoch": 1, "more": {"x": [1]},'))
    said = unmoved("train", path, "--out", run, "--resume").fine().out
    left = {"missing": 0, "torn": 1, "changed": 2}[how]
    assert (
        f"note: {file} is missing or is not what training wrote: of 2 epochs it keeps the {left} that can be read"
        in said
    )
    for weights in ("best", "last"):
        assert (run / f"{weights}.safetensors").read_bytes() == (finished / f"{weights}.safetensors").read_bytes()
    kept = [json.loads(line)["epoch"] for line in file.read_text().splitlines()]
    assert kept == [*range(1, left + 1), 3, 4]


@pytest.mark.parametrize("kill", ["before", "after"])
def test_killed_between_a_state_and_its_line_the_log_is_whole(
    trained: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kill: str
) -> None:
    """Also in the last epoch, which is then done; and with epochs in the log that were never saved."""
    path, finished = trained
    for epoch in (1, 4):
        run, real = tmp_path / f"run{epoch}", Log.add

        def add(log: Log, record: dict[str, Any], epoch: int = epoch, real: Any = real) -> None:
            if kill == "after":
                real(log, record)
            if record["epoch"] == epoch:
                raise KeyboardInterrupt
            if kill == "before":
                real(log, record)

        with monkeypatch.context() as patch:
            patch.setattr(Log, "add", add)
            assert unmoved("train", path, "--out", run).code == 130
        said = unmoved("train", path, "--out", run, "--resume").fine().out
        assert "note" not in said
        assert said.count("epoch ") == 4 - epoch
        (log, table), (full_log, full_table) = no_clock(run), no_clock(finished)
        assert log.equals(full_log)
        assert table == full_table
