"""What the project says of itself in several files agrees: versions, hooks, the tests that pages name."""

from __future__ import annotations

import re
import tomllib

import pytest
from helpers.cli import ROOT


def text(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def test_the_hooks_are_what_the_check_runs_before_the_tests() -> None:
    (recipe,) = re.findall(r"^check:.*\n((?:\t.*\n)+)", text("Makefile"), flags=re.MULTILINE)
    *before, last = (line.strip().replace("$(BIN)", ".venv/bin") for line in recipe.splitlines())
    assert last == "$(MAKE) test"
    hooks = re.findall(r"^ +entry: (.*)$", text(".pre-commit-config.yaml"), flags=re.MULTILINE)
    assert hooks == before
    assert "language: python" not in text(".pre-commit-config.yaml")  # the versions are those of the check


def test_one_version_is_named() -> None:
    version = tomllib.loads(text("pyproject.toml"))["project"]["version"]
    (newest, *_) = re.findall(r"^## \[(\d[\d.]*)\]", text("CHANGELOG.md"), flags=re.MULTILINE)
    (cited,) = re.findall(r"^version: (.*)$", text("CITATION.cff"), flags=re.MULTILINE)
    assert newest == cited == version


@pytest.mark.parametrize("page", ["CONTRIBUTING.md", "SECURITY.md", "docs/adding.md", "docs/pitfalls.md"])
def test_the_tests_that_a_page_names_are_there(page: str) -> None:
    named = set(re.findall(r"\btests/[\w/]+\.py", text(page)))
    assert named
    assert [name for name in sorted(named) if not (ROOT / name).is_file()] == []


def test_each_commit_that_blame_passes_over_is_named_in_full() -> None:
    lines = [line for line in text(".git-blame-ignore-revs").splitlines() if not line.startswith("#")]
    assert lines
    assert all(re.fullmatch(r"[0-9a-f]{40}", line) for line in lines)
