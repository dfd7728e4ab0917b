"""Settings are chosen on images held out of training: judged as training judged them, and never taken for a verdict."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.cli import RECIPE, recipe, unmoved

from unmoved.evaluation import outcomes
from unmoved.runs.assembly import Assembly
from unmoved.runs.folder import Run
from unmoved.runs.recipe import read


@pytest.fixture
def run(tmp_path: Path) -> Path:
    unmoved("train", recipe(tmp_path, RECIPE), "--out", tmp_path / "run").fine()
    return tmp_path / "run"


def test_what_training_held_out_is_judged_as_training_judged_it(run: Path) -> None:
    unmoved("evaluate", run, "--validation", "--n", 10_000).fine()  # the recipe's attack is its validation's
    opened, (fitting, held_out) = Run.open(run), Assembly(read(run / "recipe.toml")).parts()
    best = opened.metrics.sort_values(["validation_robust", "validation_clean"]).iloc[-1]
    found = outcomes.summary(outcomes.read(run / "validation" / "outcomes.csv")).set_index("measure")
    assert found.loc["clean", "n"] == len(held_out) == best["validation_n"]
    assert not set(held_out.index.tolist()) & set(fitting.index.tolist())
    assert found.loc["clean", "accuracy"] == pytest.approx(best["validation_clean"])
    assert found.loc["pgd", "accuracy"] == pytest.approx(best["validation_robust"])
    assert opened.validation["split"].endswith("validation")
    assert opened.evaluation is None


def test_validation_of_autoattack_is_no_verdict(run: Path) -> None:
    unmoved("evaluate", run, "--validation", "--attacks", "pgd,standard", "--n", 4).fine()
    opened = Run.open(run)
    assert set(opened.validation["attacks"]) == {"pgd", "autoattack"}
    assert opened.verdict is None
    assert opened.evaluation is None


def test_nothing_was_held_out(tmp_path: Path) -> None:
    text = RECIPE.replace("epochs = 2", "epochs = 1\nvalidation = 0")
    unmoved("train", recipe(tmp_path, text), "--out", tmp_path / "run").fine()
    message = unmoved("evaluate", tmp_path / "run", "--validation").mistake()
    assert "training.validation = 0" in message
    assert "nothing was held out" in message
