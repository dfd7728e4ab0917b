"""The documentation's site is built strictly, without a network, and has a page for each part that recipes name."""

from __future__ import annotations

import inspect
import os
import re
import subprocess
import sys
import zlib
from pathlib import Path

import pytest
from helpers.cli import RECIPES, ROOT

import unmoved
from unmoved.analyses.studies import STUDIES
from unmoved.runs.components import KINDS

DOCS = ROOT / "docs"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site of `make docs`: any warning, such as a link or an anchor that leads nowhere, ends the build."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--config-file", str(ROOT / "mkdocs.yml")]
    built = subprocess.run(
        [*command, "--site-dir", str(folder)],
        env=os.environ
        | {"NO_MKDOCS_2_WARNING": "1", "http_proxy": "http://0.0.0.0:9", "https_proxy": "http://0.0.0.0:9"},
        capture_output=True,
        text=True,
    )
    assert built.returncode == 0, built.stderr
    return folder


@pytest.fixture(scope="module")
def documented(site: Path) -> set[str]:
    """The names whose docstrings the site shows, from its inventory (in the format that Sphinx reads)."""
    packed = (site / "objects.inv").read_bytes().split(b"\n", 4)[4]
    return {line.split()[0] for line in zlib.decompress(packed).decode().splitlines()}


def nav() -> set[str]:
    """The pages in the navigation; the strict build refuses pages that are not there."""
    return set(re.findall(r"[\w/-]+\.md", (ROOT / "mkdocs.yml").read_text().split("\nnav:\n")[1]))


def test_every_page_stands_in_the_navigation() -> None:
    """Decisions stand in the table of their README."""
    decided = {
        f"decisions/{name}" for name in re.findall(r"\((0\d+[\w-]+\.md)\)", (DOCS / "decisions/README.md").read_text())
    }
    assert nav() | decided == {path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md")}


def test_every_page_begins_with_a_sentence() -> None:
    """Below its title, before any list, table or code."""
    pages = {path.relative_to(DOCS).as_posix(): path.read_text() for path in DOCS.rglob("*.md")}
    assert [name for name, text in pages.items() if not re.match(r"# .*\n\n(?!#|\||- |```|!\[|<|\[)\S", text)] == []


@pytest.mark.parametrize("name", [*KINDS["attacks"], "transfer"])
def test_each_attack_has_a_page(name: str) -> None:
    title = "Settings\n\n::: unmoved.attacks."
    assert f"attacks/{name}.md" in nav()
    assert title in (DOCS / f"attacks/{name}.md").read_text()


@pytest.mark.parametrize("name", STUDIES)
def test_each_analysis_has_a_page(name: str) -> None:
    assert f"analyses/{name}.md" in nav()
    assert f"unmoved analyze {name}" in (DOCS / f"analyses/{name}.md").read_text()


@pytest.mark.parametrize("name", sorted({path.stem for path in RECIPES.glob("*/*.toml")}))
def test_the_method_of_each_recipe_has_a_page(name: str) -> None:
    pages = [path.read_text() for path in DOCS.glob("methods/*.md") if path.name != "README.md"]
    assert [page for page in pages if re.search(rf"^(Recipes |\| ).*`{name}`", page.split("\n## ")[0], re.M | re.S)]


def test_the_docstring_of_every_part_is_shown(documented: set[str]) -> None:
    """Whatever a recipe can name, and whatever the public packages export as a class or a function."""
    homes = {"terms": "terms", "attacks": "attacks", "defenses": "defenses", "models": "models", "data": "data"}
    expected = {f"unmoved.{home}.{factory.__name__}" for home in homes for factory in KINDS[home].values()}
    expected |= {f"unmoved.{name}" for name in unmoved.__all__ if not inspect.ismodule(getattr(unmoved, name))}
    for name in ("attacks", "terms", "defenses", "models", "data", "optim", "averaging", "testing", "outcomes"):
        package = getattr(unmoved, name)
        parts = {export: getattr(package, export) for export in package.__all__}
        expected |= {
            f"unmoved.{name}.{export}"
            for export, part in parts.items()
            if (inspect.isclass(part) or inspect.isfunction(part)) and inspect.getdoc(part)
        }
    assert expected - documented == set()


REQUESTED = re.compile(
    r"""<(?:script|img|link|iframe|source|use)\b[^>]*?\b(?:src|href|srcset)=["']?((?:https?:)?//[^\s"'>]+)"""
)


def test_the_pages_request_nothing_from_elsewhere(site: Path) -> None:
    pages = {path: path.read_text(encoding="utf-8") for path in site.rglob("*.html")}
    assert len(pages) > 60
    assert {str(path): found for path, text in pages.items() if (found := REQUESTED.findall(text))} == {}
    styles = [path.read_text(encoding="utf-8") for path in site.rglob("*.css")]
    assert styles
    assert [text for text in styles if re.search(r"@import|url\(['\"]?(?:https?:)?//", text)] == []
