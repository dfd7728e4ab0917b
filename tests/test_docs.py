"""What the documentation shows runs as it stands.

- The Python of a page runs from top to bottom in one namespace, in an empty folder. ``<!-- setup for the tests ...
  -->`` holds code that runs before it; ``<!-- in the tests: A is B; C is D -->`` shortens what would take long.
- Shell blocks: every `unmoved` command parses, every `make` target and script exists. A block after
  ``<!-- run by the tests; where it trains with OPTIONS -->`` is run.
- TOML parses, as a part of a recipe.
- What cannot run has ``*Not run by the tests: WHY.*`` before it, for readers to see, and must still be Python.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch
import typer
from helpers.cli import RECIPES, ROOT, unmoved
from torch import nn

from unmoved.cli import app
from unmoved.runs import recipe as config
from unmoved.testing import check_term

FENCED = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
NOT_RUN = re.compile(r"^\*Not run by the tests: [^*]+\.\*\n\n```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
RUN = re.compile(
    r"<!-- run by the tests; where it trains with (.*?) -->\n\n```sh\n(.*?)^```$", re.MULTILINE | re.DOTALL
)
SETUP = re.compile(r"<!-- setup for the tests\n(.*?)-->", re.DOTALL)
SHORTER = re.compile(r"<!-- in the tests: (.*?) -->")
FILES = [*ROOT.glob("*.md"), *sorted((ROOT / "docs").rglob("*.md"))]
PAGES = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in FILES}
COMING_FROM = "docs/coming-from.md"
# Files of a part, for tests/test_new_parts.py; blocks that need other libraries, and a notebook, below.
ELSEWHERE = {"docs/adding.md", COMING_FROM, "docs/tour.md"}


def blocks(page: str, language: str) -> list[str]:
    return [code for named, code in FENCED.findall(PAGES[page]) if named == language]


def having(language: str, *, but: set[str] = frozenset()) -> list[str]:
    return [page for page in PAGES if blocks(page, language) and page not in but]


def ran(page: str) -> dict[str, object]:
    """The names that a page leaves behind, after its setup and its Python, shortened as it says."""
    names: dict[str, object] = {"__name__": page}
    exec("".join(SETUP.findall(PAGES[page])), names)
    unseen = set(NOT_RUN.findall(PAGES[page]))
    for code in blocks(page, "python"):
        for change in "; ".join(SHORTER.findall(PAGES[page])).split("; "):
            code = code.replace(*change.split(" is ")) if change else code
        compiled = compile(code, page, "exec")
        if code not in unseen:
            exec(compiled, names)
    return names


@pytest.mark.parametrize("page", having("python", but=ELSEWHERE))
# Lightning's advice on workers, and that of torch on how Lightning reads its own files.
@pytest.mark.filterwarnings("ignore:.*does not have many workers", "ignore:.*treespec", "ignore::DeprecationWarning")
def test_the_python_of_a_page_runs(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        ran(page)


def test_a_block_that_fails_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    page = "<!-- setup for the tests\na = 1\n-->\n<!-- in the tests: 9 is 1 -->\n\n```python\nassert a == 9\n```\n"
    monkeypatch.setitem(PAGES, "page", page)
    assert ran("page")["a"] == 1
    monkeypatch.setitem(PAGES, "page", page.replace("9 is 1", "9 is 2"))
    with pytest.raises(AssertionError):
        ran("page")
    hidden = "*Not run by the tests: it needs a GPU.*\n\n```python\nassert a == 9\n```\n"
    monkeypatch.setitem(PAGES, "page", hidden)
    ran("page")
    monkeypatch.setitem(PAGES, "page", hidden.replace("a ==", "a ="))
    with pytest.raises(SyntaxError):
        ran("page")


def test_what_pages_compute_is_what_they_say(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    readme = ran("README.md")
    assert torch.isfinite(readme["result"].loss)
    check_term(ran("docs/guide.md")["Entropy"]())
    ran("docs/checkpoint.md")
    assert "worst case" in capsys.readouterr().out
    assert (tmp_path / "report.html").exists()


# --- shell


def commands(code: str) -> list[list[str]]:
    """The simple commands of a shell block, as words, without variables set before them and what goes to files."""
    lines = code.replace("\\\n", " ").splitlines()
    words = [shlex.split(line, comments=True) for line in lines if "$(" not in line]
    for line in words:
        while line and re.fullmatch(r"[A-Z_]+=.*", line[0]):
            line.pop(0)
    return [line[: line.index(">")] if ">" in line else line for line in words if line]


def parse(arguments: list[str]) -> None:
    """Parse a command line of `unmoved` to the last option, as the command would."""
    group = typer.main.get_command(app)
    with group.make_context("unmoved", list(arguments)) as context:
        _, command, rest = group.resolve_command(context, [*context._protected_args, *context.args])
        command.make_context(command.name, rest, parent=context)


@pytest.mark.parametrize("page", having("sh"))
def test_the_commands_of_a_page_are_commands(page: str) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for code in blocks(page, "sh"):
        for line in commands(code):
            program = line[0].removeprefix(".venv/bin/")
            if program == "unmoved" or "unmoved.cli" in line:
                parse(line[(line.index("unmoved.cli") if "unmoved.cli" in line else 0) + 1 :])
                for word in line:
                    if re.fullmatch(r"(digits|mnist|cifar10)/\w+", word):
                        assert (RECIPES / f"{word}.toml").is_file(), word
            elif program == "make":
                assert {word for word in line[1:] if "=" not in word} <= targets, line
            elif program == "python" and line[1].endswith(".py"):
                assert (ROOT / line[1]).is_file(), line
            else:
                assert program in {"python", "python3", "pip", "torchrun", "git", "sed", "."}, line


def test_a_command_that_is_none_is_seen() -> None:
    parse(["judge", "my_models:MyNet", "--data", "digits", "--eps", "0.1", "--out", "runs/mine"])
    for wrong in (
        ["judge", "my_models:MyNet", "--data", "digits"],
        ["train", "a", "--out", "b", "--sets", "c"],
        ["tran"],
    ):
        with pytest.raises(Exception, match=r"Missing parameter|No such"):
            parse(wrong)


@pytest.mark.parametrize("page", [page for page, text in PAGES.items() if RUN.search(text)])
def test_the_commands_of_a_page_run(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for options, code in RUN.findall(PAGES[page]):
        for line in commands(code):
            assert line[0] == "unmoved"
            unmoved(*line[1:], *(shlex.split(options) if line[1] in ("train", "compare") else [])).fine()


# --- TOML


@pytest.mark.parametrize("page", having("toml"))
def test_the_tables_of_a_page_are_those_of_a_recipe(page: str) -> None:
    base = tomllib.loads((RECIPES / "digits/trades.toml").read_text())
    for code in blocks(page, "toml"):
        tables = tomllib.loads(code)
        config.parse({**base, **tables, "objective": base["objective"] | tables.get("objective", {})})


def test_the_guide_recipe_has_its_phases():
    (recipe,) = blocks("docs/guide.md", "toml")
    assert [start for start, _ in config.parse(tomllib.loads(recipe)).phase_parts()] == [0, 10]


# --- the notebook


def test_the_notebook_runs_and_its_page_is_made_of_it(tmp_path: Path) -> None:
    """In a kernel, in small; no bar and no table of ours complains there. Its page is what `make tour` makes."""
    notebook = json.loads((ROOT / "docs/tour.ipynb").read_text(encoding="utf-8"))
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "code":
            assert cell["execution_count"], "run it with `make tour`"
            assert f"```python\n{source}\n```" in PAGES["docs/tour.md"], "make its page with `make tour`"
            cell["source"] = source.replace("epochs=12", "epochs=1").replace("n=100", "n=20")
        else:
            assert source in PAGES["docs/tour.md"], "make its page with `make tour`"
    (tmp_path / "tour.ipynb").write_text(json.dumps(notebook))
    command = "-m nbconvert --log-level ERROR --to notebook --execute --inplace tour.ipynb"
    ended = subprocess.run(
        [sys.executable, *command.split()],
        cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0, ended.stderr
    cells = json.loads((tmp_path / "tour.ipynb").read_text())["cells"]
    outputs = [output for cell in cells for output in cell.get("outputs", [])]
    assert [output for output in outputs if output.get("name") == "stderr" or "Warning" in json.dumps(output)] == []
    tables = [output for output in outputs if "<table" in "".join(output.get("data", {}).get("text/html", ""))]
    assert len(tables) == 2


# --- other libraries

NEEDS = {
    "torchattacks": "torchattacks",
    "foolbox": "foolbox",
    "art": "art.attacks.evasion",
    "adv_lib": "adv_lib.attacks",
}


@pytest.mark.parametrize("number", range(len(blocks(COMING_FROM, "python"))))
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::RuntimeWarning")  # foolbox's and ART's own
def test_what_comes_from_other_libraries_runs(number):
    first, code = (blocks(COMING_FROM, "python")[k] for k in (0, number))
    for name in re.findall(r"interop\.(?:from_|to_(?!adv_lib))(\w+)", code):
        try:
            importlib.import_module(NEEDS[name])
        except Exception as error:  # a torchvision that was built for another torch raises RuntimeError
            pytest.skip(f"{NEEDS[name]} does not import: {error}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10)).eval()
        names = {"model": model, "x": torch.rand(8, 1, 8, 8), "y": torch.arange(8)}
    exec(first, names)
    assert 0 <= names["robust"] <= 1
    exec(code, names)
    found = names["x_adv"]
    names["threat"].check(torch.as_tensor(found), names["x"])


# --- links


def test_every_link_inside_the_documentation_leads_somewhere():
    for name, text in PAGES.items():
        for target in re.findall(r"\]\(([^)#]+)[^)]*\)", text):
            if "://" not in target:
                assert ((ROOT / name).parent / target).exists(), f"{name}: {target}"
