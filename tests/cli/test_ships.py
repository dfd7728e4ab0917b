"""What a wheel holds, and what the command says of what it holds: recipes, parts, its own options."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import pytest
import typer
from helpers.cli import RECIPES, ROOT, unmoved
from typer.testing import CliRunner

from unmoved import cli
from unmoved.analyses.studies import STUDIES
from unmoved.cli import grid_commands, screen
from unmoved.cli.part_description import described
from unmoved.runs import components, packaged_recipes
from unmoved.runs import recipe as config

PACKAGE = ROOT / "src" / "unmoved"
SOURCES = ("pyproject.toml", "README.md", "LICENSE", "MANIFEST.in", "Makefile", "constraints.txt")
BUILD = "import sys; from setuptools.build_meta import *; out = sys.argv[1]; build_wheel(out); build_sdist(out)"
NEEDED = {"eps": 0.1, "milestones": [1]}  # of settings without a default; the others are texts


# --- the wheel


def test_a_wheel_holds_the_whole_package_and_works_from_an_empty_folder(tmp_path: Path) -> None:
    pytest.importorskip("setuptools", minversion="77", reason="builds the wheel")
    source, built, site, empty = (tmp_path / name for name in ("source", "built", "site", "empty"))
    shutil.copytree(PACKAGE, source / "src" / "unmoved", ignore=shutil.ignore_patterns("__pycache__"))
    for name in SOURCES:
        shutil.copy(ROOT / name, source)
    empty.mkdir()
    subprocess.run([sys.executable, "-c", BUILD, built], cwd=source, check=True, capture_output=True)
    (wheel,) = built.glob("*.whl")
    files = {path.relative_to(PACKAGE.parent).as_posix() for path in PACKAGE.rglob("*") if path.is_file()}
    files = {name for name in files if "__pycache__" not in name}
    with zipfile.ZipFile(wheel) as archive:
        assert {name for name in archive.namelist() if ".dist-info/" not in name} == files
        archive.extractall(site)
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        assert {*SOURCES, *(f"src/{name}" for name in files)} <= {name.partition("/")[2] for name in archive.getnames()}
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONSAFEPATH"}
    command = [
        sys.executable,
        "-c",
        "import unmoved.cli; print(unmoved.__file__); unmoved.cli.main()",
        "show",
        "digits/at",
    ]
    said = subprocess.run(
        command, cwd=empty, env=environment | {"PYTHONPATH": str(site)}, capture_output=True, text=True, check=True
    )
    where, _, shown = said.stdout.partition("\n")
    assert Path(where) == site / "unmoved" / "__init__.py"
    assert shown == unmoved("show", "digits/at").fine().out


# --- recipes by name


def test_a_recipe_is_found_by_its_name_and_a_file_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert config.read("digits/at") == config.read(RECIPES / "digits" / "at.toml")
    (tmp_path / "digits" / "at").mkdir(parents=True)  # a run of that name
    assert config.read("digits/at").name == "digits/at"
    (tmp_path / "digits" / "trades").write_text(unmoved("show", "digits/at", "--set", "training.epochs=3").fine().out)
    assert config.read("digits/trades").training.epochs == 3
    assert unmoved("show", "digits/trades").fine().out.count('name = "digits/trades"') == 1


def test_a_shown_recipe_of_the_package_is_a_recipe_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.toml").write_text(unmoved("show", "mnist/fast").fine().out)
    head = (RECIPES / "mnist" / "fast.toml").read_text().split("\n\n")[0]
    shown = (tmp_path / "mine.toml").read_text().split("\nphases")[0]
    assert shown.split() == head.split()
    theirs = config.read("mnist/fast").tables()
    assert config.read("mine.toml").tables() == theirs | {"name": "mine"}


def test_the_demo_is_made_of_recipes_of_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(grid_commands, "compare", lambda recipes, **settings: asked.append((recipes, settings)))
    unmoved("demo", "--out", "there").fine()
    ((recipes, settings),) = asked
    assert {path.as_posix() for path in recipes} <= {*packaged_recipes.names()}
    assert settings["out"] == Path("there")


# --- parts by name


@pytest.mark.parametrize("kind", components.KINDS)
def test_the_settings_that_are_shown_are_those_a_recipe_gets(kind: str) -> None:
    """Written into a recipe, the defaults as they are shown make the table that a recipe without them has."""
    for name, part in components.KINDS[kind].items():
        page, table = described(kind, name, part), components.SETTINGS[kind][name]
        settings = re.findall(r"^  (\w+) (?:(\(needed\))|\(none\)|(= .*?))(?:  +.*| \S*)?$", page, flags=re.MULTILINE)
        assert [key for key, _, _ in settings] == [key for key in table.model_fields if key != "use"], page
        needed = {key: NEEDED.get(key, "x") for key, is_needed, _ in settings if is_needed}
        shown = tomllib.loads("\n".join(f"{key} {value}" for key, _, value in settings if value))
        assert table.model_validate({"use": name, **shown, **needed}) == table.model_validate({"use": name, **needed})


def test_a_part_is_shown_with_its_words_settings_and_example() -> None:
    said = unmoved("show", "pgd").fine().out
    assert re.search(r"^Projected gradient ascent", said, flags=re.MULTILINE)
    assert "    restarts: independent starts; each sample keeps its best.\n" in said
    assert re.search(r"^  steps = 10 +int$", said, flags=re.MULTILINE)
    assert said.endswith('[attack]\nuse = "pgd"\n\n[evaluation.attacks.pgd]\n')
    said = unmoved("show", "corruption").fine().out
    assert re.search(r"^  --hessian .*\(unmoved\[hessian\]\)\.$", said, flags=re.MULTILINE)
    assert "pgd is no recipe" in unmoved("show", "pgd", "--set", "steps=3").mistake()


def test_a_list_of_one_kind_fits_a_screen(monkeypatch: pytest.MonkeyPatch) -> None:
    in_a_pipe = unmoved("list").fine().out
    assert "..." not in in_a_pipe
    monkeypatch.setattr(screen, "console", screen._console(width=80, force_terminal=True, color_system=None))
    whole = unmoved("list").fine().out
    assert max(map(len, whole.splitlines())) <= 80
    assert "..." in whole
    for kind, names in {**components.KINDS, "analyses": STUDIES, "recipes": packaged_recipes.names()}.items():
        head, *lines = unmoved("list", kind).fine().out.splitlines()
        assert head == kind
        assert sorted(line.split()[0] for line in lines) == sorted(names)
        assert set(lines) <= set(whole.splitlines())
    assert "did you mean 'attacks'?" in unmoved("list", "attack").mistake()


# --- the command itself


def commands() -> dict[str, Any]:
    from unmoved.cli import analyze_command

    group: Any = typer.main.get_command(cli.app)
    return group.commands | {"analyze": typer.main.get_command(analyze_command.app)}


@pytest.mark.parametrize("command", commands())
def test_help_says_every_word(command: str) -> None:
    """Square brackets, too, which some that draw help take for markup."""
    said = " ".join(unmoved(command, "-h").fine().out.split()).replace("- ", "-")
    assert said == " ".join(unmoved(command, "--help").fine().out.split()).replace("- ", "-")
    for parameter in commands()[command].params:
        assert " ".join((parameter.help or "").split()).replace("- ", "-") in said


def test_the_help_of_compare_has_its_brackets() -> None:
    assert "(unmoved[ray])" in unmoved("compare", "--help").fine().out


def test_the_version() -> None:
    import unmoved as package

    assert unmoved("--version").fine().out == f"unmoved {package.__version__}\n"


def test_the_shell_completes_names_of_recipes_and_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.toml").touch()
    (tmp_path / "mint").mkdir()
    (tmp_path / "minutes.txt").touch()

    def completed(*words: str) -> list[str]:
        variables = {"COMP_WORDS": " ".join(("unmoved", *words)), "COMP_CWORD": str(len(words))}
        variables["_UNMOVED_COMPLETE"] = "complete_bash"
        return CliRunner().invoke(cli.app, env=variables, prog_name="unmoved").output.split()

    assert completed("train", "digits/trades_a") == ["digits/trades_apd", "digits/trades_awp"]
    assert completed("compare", "digits/at", "mi") == ["mine.toml", f"mint{os.sep}"]
    assert completed("sho") == ["show"]


def test_after_an_interruption_nothing_heavy_is_imported() -> None:
    """What was interrupted may be the import of torch, which bears no second try."""
    code = "import sys\nfrom unmoved import cli\ncli.how_to_go_on(['train', 'x', '--out', 'y'])\n"
    subprocess.run([sys.executable, "-c", code + "assert 'torch' not in sys.modules"], check=True)
