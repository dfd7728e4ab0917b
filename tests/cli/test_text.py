"""Text is not markup, and bytes have an encoding: names and paths of any characters, on any screen, in any locale."""

from __future__ import annotations

import ast
import io
import json
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import typer
from helpers.cli import RECIPE, ROOT, Said, recipe, unmoved

from unmoved.cli import analyze_command, app, main, screen
from unmoved.core import untrusted
from unmoved.core.errors import UnmovedError
from unmoved.data.validation import as_classes
from unmoved.evaluation.outcomes import COLUMNS
from unmoved.runs import recipe as config
from unmoved.runs.folder import Run

# --- what the sources may call

PACKAGE = ROOT / "src" / "unmoved"
SOURCES = sorted([*PACKAGE.rglob("*.py"), *(ROOT / "benchmarks").rglob("*.py")])
TEXT = {"read_text", "write_text", "open", "fdopen", "TextIOWrapper", "NamedTemporaryFile", "TemporaryFile"}
NO_TEXT = {
    "os",
    "Image",
    "tarfile",
    "zipfile",
    "archive",
    "Run",
    "runs",
    "folders",
    "webbrowser",
}  # their open is another


def called(tree: ast.AST) -> Iterator[tuple[ast.Call, str, str]]:
    """(call, whose it is, its name) of every call."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            yield node, ast.unparse(node.func.value), node.func.attr
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            yield node, "", node.func.id


def without_encoding(tree: ast.AST) -> list[str]:
    """Calls that read or write text in the encoding of the locale."""
    found = []
    for call, whose, name in called(tree):
        given = {word.arg: ast.unparse(word.value) for word in call.keywords}
        modes = [ast.unparse(part) for part in call.args[:2]] + [given.get("mode", "")]
        binary = any(re.fullmatch(r"'[rwxa+]*b[rwxa+]*'", mode) for mode in modes)
        decodes = {"text", "universal_newlines"} & given.keys()
        other = name == "open" and whose.split(".")[-1] in NO_TEXT
        if decodes or (name in TEXT and not other and not binary):
            found += [ast.unparse(call)] * ("encoding" not in given)
    return found


def said_elsewhere(tree: ast.AST) -> list[str]:
    """Calls that print otherwise than by `unmoved.cli.screen.say`."""
    found = []
    for call, whose, name in called(tree):
        prints = name == "print" and (whose == "" or "rich" in whose or "onsole" in whose)
        writes = name == "write" and whose in ("sys.stdout", "sys.stderr")
        found += [ast.unparse(call)] * (name in ("Console", "echo", "secho") or prints or writes)
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_text_is_never_read_or_written_in_the_encoding_of_the_locale(path: Path) -> None:
    assert without_encoding(ast.parse(path.read_text(encoding="utf-8"))) == []


# What is no message of the command: a recipe or a schema for a program to read, what other processes log.
WRITES = {"cli/screen.py": 2, "cli/export_command.py": 1, "cli/info_commands.py": 2, "core/messages.py": 1}


def test_everything_is_printed_in_one_place_as_it_is() -> None:
    count = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        calls = said_elsewhere(ast.parse(path.read_text(encoding="utf-8")))
        count |= {path.relative_to(PACKAGE).as_posix(): len(calls)} if calls else {}
    assert count == WRITES
    for console in (screen.console, screen.complaints, screen._console()):
        assert (console._markup, console._emoji, console._highlight) == (False, False, False)


def test_the_checks_themselves_see_every_way() -> None:
    text = (
        "p.read_text()\np.write_text('x')\nopen(p)\nopen(p, 'w')\np.open()\nwith p.open('w') as f: pass\n"
        "subprocess.run(c, text=True)\nos.fdopen(3)\nio.TextIOWrapper(b)\n"
        "p.read_text(encoding='utf-8')\nopen(p, 'rb')\nopen(p, mode='wb')\nos.open(p, 0)\nRun.open(p)\n"
        "os.fdopen(3, 'rb')\n"
    )
    assert len(without_encoding(ast.parse(text))) == 9
    said = "print(1)\nrich.print(1)\nConsole()\nconsole.print(1)\nsys.stdout.write('')\ntyper.echo(1)\nsay(1)\n"
    assert len(said_elsewhere(ast.parse(said))) == 6


# --- what people see

ODD = "a [/x] :smile: [red]b[/] $c$ {d} %s"


def test_words_are_printed_as_they_are(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    screen.say(ODD)
    assert capsys.readouterr().out == ODD + "\n"
    row = dict.fromkeys(COLUMNS, 0) | {"attack": "[b]pgd[/]", "eps": 0.1, "norm": "linf", "distance": 0.0}
    rows = [row | {"index": k, "success": False, "by": "none"} for k in range(3)]
    screen.print_summary({ODD: pd.DataFrame(rows)})
    printed = capsys.readouterr().out
    assert ODD in printed
    assert "[b]pgd[/]" in printed


def test_progress_on_a_terminal_shows_names_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = io.StringIO()
    monkeypatch.setattr(screen, "console", screen._console(file=shown, force_terminal=True, width=200))
    with screen.bars() as add:
        add(ODD, 2.0)(1.0)
    with screen.follow() as tell:
        tell(0.5, ODD)
    assert shown.getvalue().count(ODD) >= 2


class Ascii(io.TextIOWrapper):
    """A screen that knows no other characters."""

    def __init__(self) -> None:
        self.bytes = io.BytesIO()
        super().__init__(self.bytes, encoding="ascii", write_through=True)

    def text(self) -> str:
        return self.bytes.getvalue().decode("ascii")


def on_ascii(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> Said:
    out, err, code = Ascii(), Ascii(), 0
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", out)
        patch.setattr(sys, "stderr", err)
        patch.setattr(sys, "argv", ["unmoved", *map(str, arguments)])
        try:
            main()
        except SystemExit as end:
            code = int(end.code or 0)
    return Said(code, out.text(), err.text())


def test_a_screen_without_these_characters_shows_escapes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And a recipe so shown is still the same recipe."""
    name = "gr\u00f6\u00dfe \u2603 \U0001f600"
    path = tmp_path / "u.toml"
    path.write_text(f'name = "{name}"\n' + RECIPE, encoding="utf-8")
    shown = on_ascii(monkeypatch, "show", path).fine().out
    assert tomllib.loads(shown)["name"] == name
    assert "\\u00e9" in on_ascii(monkeypatch, "show", tmp_path / "\u00e9.toml").mistake()
    trained = on_ascii(monkeypatch, "train", path, "--out", tmp_path / "run\u00e9").fine().out
    assert trained.endswith("run\\u00e9\n")
    on_ascii(monkeypatch, "evaluate", tmp_path / "run\u00e9").fine()
    on_ascii(monkeypatch, "report", tmp_path / "run\u00e9", "--out", tmp_path / "r.html").fine()
    assert name in (tmp_path / "r.html").read_text(encoding="utf-8")


def test_help_says_all_that_its_texts_say(monkeypatch: pytest.MonkeyPatch) -> None:
    """Square brackets in a help text are markup, and vanish."""
    monkeypatch.setenv("COLUMNS", "500")
    monkeypatch.setenv("TERMINAL_WIDTH", "500")
    group: Any = typer.main.get_command(app)
    analyze: Any = typer.main.get_command(analyze_command.app)  # its own, with the options of the studies
    for name, command in [*group.commands.items(), ("analyze", analyze)]:
        shown = re.sub(r"[^!-~]+", " ", unmoved(name, "--help").fine().out)
        for text in [command.help, *(part.help for part in command.params if getattr(part, "help", None))]:
            for words in text.replace("\\[", "[").split("\n\n"):
                assert re.sub(r"[^!-~]+", " ", words).strip() in shown, (name, words)
    assert "(unmoved[ray])" in re.sub(r"\s+", " ", unmoved("compare", "--help").fine().out)


def test_a_wrong_command_line_is_shown_as_it_is(tmp_path: Path) -> None:
    for arguments in (["[/x]"], ["train", "[/x]"], ["show", "--[/x]"], ["evaluate", "r", "[/x]"]):
        said = unmoved(*arguments)
        assert said.code == 2
        assert "[/x]" in said.err or arguments == ["train", "[/x]"], said.err


# --- names and paths


@pytest.fixture
def odd(tmp_path: Path) -> Path:
    """A folder whose name is markup, an emoji, and no UTF-8."""
    path = tmp_path / os.fsdecode(b"o[/x]:smile:\xff [b]")
    try:
        path.mkdir(parents=True)
    except OSError:
        pytest.skip("this file system knows UTF-8 alone")
    return path


def test_a_folder_of_any_name_is_a_folder_like_others(odd: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    named = recipe(odd, RECIPE)
    run, shown = odd / "run[a]", screen.plain(str(odd))
    assert f"trained: {shown}/run[a]\nnext: unmoved evaluate {shown}/run[a]\n" in unmoved(
        "train", named, "--out", run, "--set", "training.epochs=1"
    ).fine().out  # fmt: skip
    assert Run.open(run).name == "x]:smile:-xff [b]/tiny"
    unmoved("train", named, "--out", run, "--resume", "--set", "training.epochs=1").fine()
    asked = ["--attacks", f"pgd,transfer:{run}", "--save-adversarial", "--no-doctor"]
    said = unmoved("evaluate", run, "--n", "8", *asked).fine().out
    assert f"saved: {shown}/run[a]/evaluation" in said
    assert f"next: unmoved report {shown}/run[a]" in said
    assert f"saved: {shown}/run[a]/doctor.json" in unmoved("doctor", run, "--n", "2").fine().out
    unmoved("report", run, "--out", odd / "r.html", "--title", str(odd)).fine()
    page = (odd / "r.html").read_text(encoding="utf-8")
    assert "x]:smile:-xff [b]/tiny" in page
    unmoved("analyze", "softmax", run, "--out", odd / "analysis", "--n", "4").fine()
    assert screen.plain(str(odd / "none.toml")) in unmoved("show", odd / "none.toml").mistake()
    (run / "evaluation" / "evaluation.json").write_text("[", encoding="utf-8")
    assert shown in unmoved("report", run, "--out", odd / "s.html").mistake()


def test_what_utf8_cannot_hold_is_refused_where_it_would_be_written(tmp_path: Path) -> None:
    path = recipe(tmp_path)
    for key in ("name", "data.path", "attack.use"):
        with pytest.raises(UnmovedError, match=r"no UTF-8|printable"):
            config.read(path, [f"{key}=\udcff"])
    with pytest.raises(UnmovedError, match="it: expected text, came bytes that are no UTF-8"):
        untrusted.json_object(json.dumps({"a": ["\udcff"]}), "it")
    assert untrusted.readable("a\udcff\u00e9") == "a\\xff\u00e9"
    assert untrusted.readable("\ud800") == "\\ud800"
    assert as_classes("x", ["a", "b\udcff"], 1) == ("a", "b\\xff")


def test_files_are_utf8_whatever_the_locale(tmp_path: Path) -> None:
    """Written here, read by a Python whose locale knows ASCII alone."""
    path = tmp_path / "u.toml"
    path.write_text('name = "gr\u00f6\u00dfe"\n' + RECIPE, encoding="utf-8")
    unmoved("train", path, "--out", tmp_path / "r", "--set", "training.epochs=1").fine()
    unmoved("evaluate", tmp_path / "r", "--n", "10", "--no-doctor").fine()
    code = (
        "import sys\nfrom unmoved.cli import main\n"
        "for command in sys.argv[1:]:\n"
        "    sys.argv = ['unmoved', *command.split('|')]\n"
        "    try:\n        main()\n"
        "    except SystemExit as end:\n        assert not end.code, command\n"
    )
    commands = [f"report|{tmp_path / 'r'}|--out|{tmp_path / 'x.html'}", f"evaluate|{tmp_path / 'r'}|--n|10|--no-doctor"]
    commands += [f"train|{path}|--out|{tmp_path / 'r'}|--resume|--set|training.epochs=1", f"show|{path}"]
    locale = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = subprocess.run([sys.executable, "-c", code, *commands], env=os.environ | locale, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert 'name = "gr\\u00f6\\u00dfe"' in done.stdout.decode("ascii")
    assert "gr\u00f6\u00dfe" in (tmp_path / "x.html").read_text(encoding="utf-8")
