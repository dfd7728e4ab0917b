"""Run folders that version 0.1 made, before its modules moved: they are opened, judged, reported on and resumed."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from helpers.cli import unmoved

from unmoved import Run

BEFORE = Path(__file__).with_name("before_0_2")


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    shutil.copytree(BEFORE, tmp_path / "runs")
    return tmp_path / "runs"


def test_a_finished_run_is_opened_judged_examined_and_reported_on(folders: Path) -> None:
    run = Run.open(folders / "finished")
    assert len(run.metrics) == 2
    assert run.outcomes is not None
    assert len(run.outcomes) == 30
    unmoved("report", run.path, "--out", folders / "report.html").fine()
    assert "tiny" in (folders / "report.html").read_text(encoding="utf-8")
    unmoved("doctor", run.path, "--n", 5).fine()
    unmoved("evaluate", run.path, "--n", 10).fine()
    assert len(Run.open(run.path).outcomes) == 10  # type: ignore[arg-type]
    unmoved("analyze", "softmax", run.path, "--n", 5, "--out", folders / "analysis").fine()


def test_an_interrupted_run_is_trained_to_its_end(folders: Path) -> None:
    path = folders / "interrupted"
    said = unmoved("train", path / "recipe.toml", "--out", path, "--resume").fine().out
    assert "epoch 1/2" not in said
    assert "epoch 2/2" in said
    assert len(Run.open(path).metrics) == 2


def test_a_finished_run_has_nothing_left_to_train(folders: Path) -> None:
    path = folders / "finished"
    assert "epoch" not in unmoved("train", path / "recipe.toml", "--out", path, "--resume").fine().out
