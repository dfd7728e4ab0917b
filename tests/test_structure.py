"""The house keeps its shape: imports run one way, files stay small, and nothing names this machine or a registry."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.cli import ROOT

import unmoved

PACKAGE = ROOT / "src" / "unmoved"
# A room may import those of earlier ranks, never one of its own rank or a later one.
RANKS = (
    ("errors",),
    ("failures", "guesses", "reading", "preconditions"),
    ("disk",),
    ("protocols", "lock", "pool", "foreign"),
    ("noise", "passes", "schedule", "processes", "weights", "cluster"),
    ("views", "threat", "averaging", "precision", "outcomes", "provenance", "drawing"),
    ("journal", "log", "workers", "opinion", "shelf", "checkpoint"),
    ("records",),
    ("terms", "figures", "judged", "pages"),
    ("attacks", "defenses", "data", "models", "optim", "verdicts"),
    ("components", "beside", "checks", "engine", "sharing"),
    ("keys",),
    ("config", "run"),
    ("built",),
    ("analyses", "judge", "report", "resuming", "state", "step"),
    ("rehearsal",),
    ("loop", "doctor", "exhibits", "successes"),
    ("load",),
    ("evaluation", "jobs", "training"),
    ("studies",),
    ("compare", "testing", "screen"),
    ("cli",),
)
RANK = {room: number for number, rooms in enumerate(RANKS) for room in rooms}
MOST_LINES = 320


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def imported_rooms(tree: ast.AST) -> Iterator[str]:
    """The rooms that a file imports when it runs, inside functions too; imports for types alone are left out."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            for other in node.orelse:
                yield from imported_rooms(other)
        elif isinstance(node, ast.Import):
            yield from (alias.name.split(".")[1] for alias in node.names if alias.name.startswith("unmoved."))
        elif isinstance(node, ast.ImportFrom) and node.module == "unmoved":
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("unmoved."):
            yield str(node.module).split(".")[1]
        else:
            yield from imported_rooms(node)


FILES = sorted(path for path in PACKAGE.rglob("*.py") if path.parent != PACKAGE or path.stem != "__init__")


def test_every_room_has_a_rank() -> None:
    assert {room(path) for path in FILES} - RANK.keys() == set()


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_imports_run_one_way(path: Path) -> None:
    own = room(path)
    for other in set(imported_rooms(ast.parse(path.read_text(encoding="utf-8")))) - {own}:
        assert RANK[other] < RANK[own], f"{own} (rank {RANK[own]}) imports {other} (rank {RANK[other]})"


def test_the_check_itself_sees_every_way_to_import() -> None:
    text = (
        "import unmoved.evaluation.judge\nfrom unmoved import loop, run as r\nfrom unmoved.terms.sum import Sum\n"
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import unmoved.cli\n"
        "def f():\n    try:\n        from unmoved import data\n    except ImportError:\n        pass\n"
    )
    assert set(imported_rooms(ast.parse(text))) == {"judge", "loop", "run", "terms", "data"}


def test_no_relative_imports() -> None:
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            assert not (isinstance(node, ast.ImportFrom) and node.level), path


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_files_stay_small(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= MOST_LINES


def test_files_are_ascii() -> None:
    for path in FILES:
        assert path.read_text(encoding="utf-8").isascii(), path


# --- nothing of this machine


def tracked() -> list[Path]:
    """The files that a clone would have."""
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("not a clone")
    command = ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return [path for name in listed.split("\0") if name and (path := ROOT / name).is_file()]


def test_nothing_names_a_registry_or_a_path_of_some_machine() -> None:
    # Put together here, so that this file does not name them either.
    hosts = [
        "py" + "pi.org",
        "python" + "hosted.org",
        "download.py" + "torch.org",
        "ana" + "conda.org",
        "cra" + "tes.io",
    ]
    hosts += ["index" + "-url", "npm" + "js.org"]
    paths = [f"/{name}/" for name in ("wo" + "rk", "ro" + "ot", "ho" + "me", "Us" + "ers")] + ["/t" + "mp/w"]
    pattern = re.compile("|".join(re.escape(word) for word in hosts) + "|" + "|".join(rf"(?<![\w.]){p}" for p in paths))
    found = []
    for path in tracked():
        data = path.read_bytes()
        if b"\0" not in data[:8192]:
            text = data.decode("utf-8", errors="replace")
            found += [f"{path.relative_to(ROOT)}: {match.group()}" for match in pattern.finditer(text)]
    assert found == []


def test_no_file_is_large() -> None:
    assert [path for path in tracked() if path.stat().st_size > 1_000_000] == []


# --- the front door


def test_import_alone_is_light_and_every_name_resolves() -> None:
    code = (
        "import sys, unmoved\n"
        "heavy = {'torch', 'numpy', 'pandas', 'pydantic', 'matplotlib', 'lightning_fabric'} & sys.modules.keys()\n"
        "assert not heavy, heavy\n"
        "assert dir(unmoved) == unmoved.__all__\n"
        "import unmoved.cli\n"
        "heavy = {'torch', 'pandas', 'pydantic', 'matplotlib', 'lightning_fabric'} & sys.modules.keys()\n"
        "assert not heavy, heavy\n"
        "import unmoved.runs.train, unmoved.runs.evaluate, unmoved.experiments.compare\n"  # what each worker of a grid waits for
        "heavy = {'scipy.stats', 'sklearn', 'matplotlib', 'lightning_fabric'} & sys.modules.keys()\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    for name in unmoved.__all__:
        assert getattr(unmoved, name) is not None
    assert re.match(r"\d+\.\d+", unmoved.__version__)
    assert sorted(unmoved.__all__) == sorted(set(unmoved.__all__))
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        _ = unmoved.trian


def test_the_lazy_names_are_those_that_type_checkers_see() -> None:
    tree = ast.parse((PACKAGE / "__init__.py").read_text())
    (checked,) = (node for node in tree.body if isinstance(node, ast.If))
    names = {alias.name for node in checked.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert names == set(unmoved.__all__)


@pytest.mark.parametrize("name", ["attacks", "data", "defenses", "models", "optim", "terms", "testing", "weights"])
def test_namespaces_export_what_they_name(name: str) -> None:
    namespace = getattr(unmoved, name)
    for export in getattr(namespace, "__all__", []):
        assert getattr(namespace, export) is not None
        assert (getattr(namespace, export).__doc__ or "").strip(), export
