"""A new part costs what docs/adding.md says: its own files, added to a copy of the package, are found by everything."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
from helpers.cli import RECIPE, ROOT, unmoved

from unmoved import Run

PARTS = {"terms": "Brier", "attacks": "Nudge", "defenses": "Clipped", "data": "stripes"}
CASES = """
from helpers.ddp_cases import CASES, alone, trained
for name in ("attack Nudge", "objective Brier", "defense Clipped"):
    assert trained(CASES[name](), alone(), epochs=1)
"""


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package and its exam with a file for each part, as docs/adding.md shows it, and an export."""
    copy = tmp_path_factory.mktemp("copy")
    for part in ("src/unmoved", "tests/helpers", "tests/testing"):
        shutil.copytree(ROOT / part, copy / part, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("pyproject.toml", "tests/conftest.py"):
        shutil.copy(ROOT / file, copy / file)
    shown = re.findall(r"`src/unmoved/(\w+)/(\w+)\.py`:\n\n```python\n(.*?)```", page(), flags=re.DOTALL)
    assert [package for package, _, _ in shown] == list(PARTS)
    for package, module, text in shown:
        folder, name = copy / "src" / "unmoved" / package, PARTS[package]
        assert not (folder / f"{module}.py").exists()
        (folder / f"{module}.py").write_text(text)
        init = (folder / "__init__.py").read_text()
        line = f"from unmoved.{package}.{module} import {name}\n"
        assert init.count("\n__all__ = [") == 1
        (folder / "__init__.py").write_text(init.replace("\n__all__ = [", f'{line}\n__all__ = ["{name}", '))
    return copy


COLUMN = '    Column("moved", np.bool_, older=lambda table: table["distance"] > 0),\n'
OPENED = """
from unmoved import Run
table = Run.open("older").outcomes
assert list(table.columns)[-1] == "moved", table.columns
assert table["moved"].equals((table["distance"] > 0).rename("moved"))
"""


@pytest.fixture(scope="module")
def with_column(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package with a line more in its list of columns, beside a run folder that was made without it."""
    copy = tmp_path_factory.mktemp("column")
    shutil.copytree(ROOT / "src/unmoved", copy / "src/unmoved", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "tests/runs/before_0_2/finished", copy / "older")
    path = copy / "src/unmoved/evaluation/outcomes.py"
    lines = path.read_text().splitlines(keepends=True)
    lines.insert(next(k for k, line in enumerate(lines) if line.startswith('    Column("by"')) + 1, COLUMN)
    path.write_text("".join(lines))
    return copy


CHAPTER = """
from unmoved import Run
from unmoved.analyses.studies import STUDIES, subjects
study = STUDIES["calibration"].for_report()(subjects([Run.open("older")], 30))
assert [section.id for section in study.sections] == ["calibration"]
assert study.settings == {"bins": 5}
"""
ANALYSIS = '    "calibration:Calibration",\n'


@pytest.fixture(scope="module")
def with_analysis(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package with the files of an analysis and a line more in its list, beside a run folder."""
    copy = tmp_path_factory.mktemp("analysis")
    shutil.copytree(ROOT / "src/unmoved", copy / "src/unmoved", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "tests/runs/before_0_2/finished", copy / "older")
    studies = copy / "src/unmoved/analyses/studies"
    shown = re.findall(r"`src/unmoved/analyses/studies/(\w+)\.py`:\n\n```python\n(.*?)```", page(), flags=re.DOTALL)
    assert [module for module, _ in shown] == ["calibration", "calibration_figures"]
    for module, text in shown:
        assert not (studies / f"{module}.py").exists()
        (studies / f"{module}.py").write_text(text)
    lines = (studies / "__init__.py").read_text().splitlines(keepends=True)
    lines.insert(lines.index('    "tradeoff:TradeOff",\n') + 1, ANALYSIS)
    (studies / "__init__.py").write_text("".join(lines))
    return copy


def page() -> str:
    return (ROOT / "docs/adding.md").read_text(encoding="utf-8")


def python(copy: Path, *arguments: str, folder: str = ".") -> str:
    """What Python says, where the package is the copy."""
    paths = os.pathsep.join(str(copy / name) for name in ("src", "tests"))
    ended = subprocess.run(
        [sys.executable, *arguments],
        cwd=copy / folder,
        env=os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout


def test_the_exam_finds_them(copy: Path) -> None:
    names = "Brier or Nudge or Clipped or every_exported"
    said = python(
        copy, "-m", "pytest", "-n0", "-p", "no:cacheprovider", "-rA", "tests/testing/test_exam.py", "-k", names
    )
    passed = set(re.findall(r"^PASSED tests/testing/test_exam.py::(\S+)", said, flags=re.MULTILINE))
    assert {
        "test_terms_sit_the_exam[Brier()]",
        "test_other_attacks_sit_it_as_their_constructors_make_them[Nudge-linf]",
        "test_other_attacks_sit_it_as_their_constructors_make_them[Nudge-l2]",
        "test_defenses_sit_the_exam[Clipped(most=1.0)]",
        "test_every_exported_method_sits_it",
    } <= passed


def test_the_test_of_several_processes_has_them_among_its_cases(copy: Path) -> None:
    python(copy, "-c", CASES)


def test_a_recipe_names_them(copy: Path) -> None:
    changes = {
        'use = "digits"\ntest = 1500': 'use = "stripes"\nn = 120',
        '[attack]\nuse = "pgd"\nsteps = 2': '[attack]\nuse = "nudge"\n\n[defense]\nuse = "clipped"\nmost = 2.0',
        "[objective.ce]": "[objective.brier]",
        '[evaluation.attacks.pgd]\nuse = "pgd"\nsteps = 2\nkeep = "best"': '[evaluation.attacks.nudge]\nuse = "nudge"',
    }
    text = RECIPE
    for old, new in changes.items():
        assert old in text
        text = text.replace(old, new)
    (copy / "tiny.toml").write_text(text)
    python(copy, "-m", "unmoved", "train", "tiny.toml", "--out", "run")
    python(copy, "-m", "unmoved", "evaluate", "run")
    outcomes = pd.read_csv(copy / "run" / "evaluation" / "outcomes.csv")
    assert set(outcomes["attack"]) == {"nudge"}
    assert len(outcomes) == 30
    assert '"brier"' in (copy / "run" / "metrics.jsonl").read_text()


def test_a_column_of_outcomes_is_one_line(with_column: Path) -> None:
    """A run from before opens with it, a new evaluation writes it, and this version reads what that one wrote."""
    assert COLUMN.strip() in page()
    python(with_column, "-c", OPENED)
    python(with_column, "-m", "unmoved", "evaluate", "older", "--n", "10", "--no-doctor")
    written = pd.read_csv(with_column / "older" / "evaluation" / "outcomes.csv")
    assert written["moved"].tolist() == (written["distance"] > 0).tolist()
    assert written["moved"].any()
    here = Run.open(with_column / "older").outcomes
    assert here is not None
    assert here["moved"].tolist() == [str(value) for value in written["moved"]]
    unmoved("report", with_column / "older", "--out", with_column / "report.html").fine()


def test_an_analysis_is_its_files_and_one_line(with_analysis: Path) -> None:
    """The command has it and its option, and so has the report of a comparison."""
    assert ANALYSIS.strip() in page()
    command = ("-m", "unmoved", "analyze", "calibration", "older", "--n", "30", "--out", "out")
    said = python(with_analysis, *command, "--bins", "4")
    assert re.search(r"^- .*: expected calibration error 0\.\d{3}\.$", said, flags=re.MULTILINE)
    bins = pd.read_csv(with_analysis / "out/calibration/bins.csv")
    assert bins["n"].sum() == 30
    assert bins["bin"].max() <= 3
    assert "<figure>" in (with_analysis / "out/calibration/index.html").read_text(encoding="utf-8")
    shown = re.sub(r"\W+", " ", python(with_analysis, "-m", "unmoved", "analyze", "--help"))
    assert "softmax corruption bias variance tradeoff or calibration" in shown
    assert "calibration intervals of confidence of one width" in shown
    python(with_analysis, "-c", CHAPTER)
