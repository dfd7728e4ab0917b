"""A recipe names an attack of another library: by a function of the user's own, or by the adapter itself."""

from __future__ import annotations

import sys
import types
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.cli import RECIPE, recipe, unmoved
from helpers.interop_marks import QUIET

from unmoved.runs.folder import Run

pytestmark = QUIET
MINE = """
from unmoved import interop, ThreatModel

def pgd(threat: ThreatModel, seed: int = 0, steps: int = 3) -> interop.LibraryAttack:
    return interop.from_torchattacks("PGD", threat, alpha=0.05, steps=steps, seed=seed)
"""
EVALUATED = """
[evaluation.attacks.mine]
use = "their_lab:pgd"
steps = 4

[evaluation.attacks.by_name]
use = "unmoved.interop:from_torchattacks"
attack = "Square"
n_queries = 20
"""


@pytest.fixture
def lab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with the user's module, from which the command is run."""
    (tmp_path / "their_lab.py").write_text(MINE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    yield tmp_path
    sys.modules.pop("their_lab", None)


def test_a_run_is_trained_and_evaluated_with_them(lab: Path, torchattacks: types.ModuleType) -> None:
    text = RECIPE.replace('[attack]\nuse = "pgd"\nsteps = 2', '[attack]\nuse = "their_lab:pgd"\neps = 0.05')
    assert text != RECIPE
    recipe(lab, text + EVALUATED)
    allowed = ("--allow", "their_lab", "--allow", "unmoved")
    unmoved("train", "tiny.toml", "--out", "run", *allowed).fine()
    run = Run.open("run")
    assert run.metrics["eps"].tolist() == [0.05, 0.05]
    unmoved("evaluate", "run", *allowed).fine()
    assert run.evaluation["kinds"] == {
        "pgd": {"pgd": "fixed-step gradients"},
        "mine": {"mine": "fixed-step gradients"},
        "by_name": {"by_name": "queries"},
    }
    outcomes = run.outcomes
    assert outcomes is not None
    assert 0 < outcomes.loc[outcomes["attack"] == "mine", "success"].mean() < 1


def test_a_mistake_in_a_recipe_is_one_sentence(lab: Path, torchattacks: types.ModuleType) -> None:
    recipe(lab, RECIPE + EVALUATED.replace("n_queries", "queries"))
    allowed = ("--allow", "their_lab", "--allow", "unmoved")
    message = unmoved("train", "tiny.toml", "--out", "run", *allowed).mistake()
    assert "torchattacks Square: it takes no 'queries'; did you mean 'n_queries'?" in message


def test_the_adapter_has_to_be_allowed_too(lab: Path) -> None:
    recipe(lab, RECIPE + EVALUATED[EVALUATED.index("[evaluation.attacks.by_name]") :])
    message = unmoved("train", "tiny.toml", "--out", "run").mistake()
    assert "'unmoved.interop:from_torchattacks', which recipes do not reach unasked" in message
    assert message.endswith("repeat the command with --allow unmoved")
