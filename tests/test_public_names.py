"""What users type: every import that README, docs and recipes name works, and every recipe finds its parts."""

from __future__ import annotations

import importlib
import re

import pytest
from helpers.cli import ROOT

import unmoved
from unmoved.core.errors import UnmovedError

PATHS = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]
PAGES = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in PATHS}
IMPORT = re.compile(r"^\s*(from unmoved\S* import [^\n(]+|import unmoved\S*)$", re.MULTILINE)
# The files that docs/adding.md has its readers write.
NEW = {name.replace("/", ".") for name in re.findall(r"`src/(unmoved/[\w/]+)\.py`", PAGES["docs/adding.md"])}
LINES = sorted({line for text in PAGES.values() for line in IMPORT.findall(text) if line.split()[1] not in NEW})
TOP = """
Attack Batch Method ParameterDefense Phases Ramp Run StatefulTerm Term ThreatModel UnmovedError Views doctor evaluate
judge report train train_step analyses attacks averaging data defenses interop models optim outcomes terms testing
weights
"""
MODULES = (
    "attacks averaging cli data defenses interop models noise optim outcomes protocols terms testing threat weights"
)


def test_the_top_is_what_it_was() -> None:
    assert set(TOP.split()) == set(unmoved.__all__)


@pytest.mark.parametrize("line", LINES)
def test_a_documented_import_works(line: str) -> None:
    exec(line.split("  #")[0], {})


@pytest.mark.parametrize("name", MODULES.split())
def test_a_public_module_is_imported_by_its_name(name: str) -> None:
    module = importlib.import_module(f"unmoved.{name}")
    for export in getattr(module, "__all__", []):
        assert getattr(module, export) is not None


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("weights", "perturbed"),
        ("outcomes", "summary"),
        ("optim", "SGD"),
        ("averaging", "EMA"),
        ("noise", "uniform"),
        ("protocols", "Batch"),
        ("threat", "ThreatModel"),
    ],
)
def test_what_moved_is_the_same_thing_under_its_public_name(module: str, name: str) -> None:
    public = getattr(importlib.import_module(f"unmoved.{module}"), name)
    assert getattr(importlib.import_module(public.__module__), name) is public


def test_an_error_is_caught_by_its_public_name() -> None:
    with pytest.raises(unmoved.UnmovedError):
        raise UnmovedError("one class")
