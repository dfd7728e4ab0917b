"""Judged runs for the tests of exports: made once, and copied by whoever changes one."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers.cli import RECIPE, recipe, unmoved

from unmoved.evaluation.estimate import Estimate
from unmoved.runs import records
from unmoved.runs.folder import Run


@pytest.fixture(scope="session")
def judged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that its recipe's attack, AutoAttack, a validation and the doctor have judged; not to be changed."""
    folder = tmp_path_factory.mktemp("judged")
    path, run = recipe(folder, 'name = "tiny"\n' + RECIPE), folder / "run"
    unmoved("train", path, "--out", run, "--set", "training.epochs=8").fine()
    unmoved("evaluate", run, "--no-doctor", "--attacks", "recipe,quick").fine()
    unmoved("evaluate", run, "--no-doctor", "--attacks", "standard", "--n", 8).fine()
    unmoved("evaluate", run, "--validation", "--n", 12).fine()
    unmoved("doctor", run, "--n", 10).fine()
    return run


@pytest.fixture(scope="session")
def export(judged: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The export of ``judged``, not to be changed."""
    folder = tmp_path_factory.mktemp("export") / "folder"
    unmoved("export", judged, "--out", folder).fine()
    return folder


@pytest.fixture(scope="session")
def sampled(judged: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run with a sampled verdict in place of the complete one; not to be changed.

    AutoAttack is said to have been asked about half of what quick left, and to have broken two.
    """
    run = Run.open(shutil.copytree(judged, tmp_path_factory.mktemp("sampled") / "run"))
    facts, table, asked = run.evaluation, run.outcomes, run.verdict_outcomes
    assert facts is not None
    assert table is not None
    assert run.verdict is not None
    cheap = table[table["attack"] == "quick"].reset_index(drop=True)
    left = int((~cheap["success"]).sum())
    estimate = Estimate(len(cheap), left, near=2, near_broken=1, far_asked=(left - 2) // 2, far_broken=1)
    sample = records.sample(estimate, run.verdict["attacks"]["autoattack"], {"apgd-ce": "gradients"})
    settings = {"quick": facts["attacks"]["quick"]}
    run.save_evaluation(cheap, {**facts, "attacks": settings, "sample": sample}, kind="sampled", asked=asked)
    shutil.rmtree(run.path / "verdict")
    return run.path


@pytest.fixture
def changed(judged: Path, tmp_path: Path) -> Callable[..., Path]:
    """Copy ``judged`` without some of its files, and with other words in its recipe."""

    def copy(*without: str, words: tuple[str, str] = ("", "")) -> Path:
        run = Path(shutil.copytree(judged, tmp_path / "run"))
        for name in without:
            shutil.rmtree(run / name) if (run / name).is_dir() else (run / name).unlink()
        if words != ("", ""):
            text = (run / "recipe.toml").read_text(encoding="utf-8")
            assert words[0] in text
            (run / "recipe.toml").write_text(text.replace(*words), encoding="utf-8")
        return run

    return copy
