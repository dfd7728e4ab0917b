"""The house keeps its shape: imports run one way, files stay small, and nothing names this machine or a registry."""

from __future__ import annotations

import ast
import itertools
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import scipy.sparse.csgraph
from helpers.cli import ROOT

import unmoved

PACKAGE = ROOT / "src" / "unmoved"
# A package imports what stands before it, imports for types included; those of one rank do not import each other.
RANKS = (
    ("core",),
    ("terms", "defenses", "models", "data"),
    ("attacks",),
    ("testing", "interop"),
    ("evaluation",),
    ("training",),
    ("runs",),
    ("reports", "exports"),
    ("analyses",),
    ("experiments",),
    ("any_model",),
    ("cli",),
)
RANK = {package: number for number, packages in enumerate(RANKS) for package in packages}
# Public modules whose content lives in a package: a few lines each, and nothing of ours imports them.
FACADES = ("averaging", "noise", "optim", "outcomes", "protocols", "threat", "weights")
FILES_ALONE = ("recipes",)  # folders without code
LOOSE = ("any_model",)  # at most two modules that are in no package, above all of them but the command
MOST_LINES, MOST_LINES_OF_A_FUNCTION = 400, 60
# Functions that may be longer, and how long they are: these numbers may only fall.
LONG: dict[str, int] = {}


def dotted(path: Path, package: Path) -> str:
    """The name of a module below the package: ``terms.sum``; of a package's __init__ the package's."""
    parts = path.relative_to(package).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(package: Path) -> dict[str, set[str]]:
    """Module -> the modules of the package that it imports, inside functions and for types alone too."""
    files = {dotted(path, package): path for path in sorted(package.rglob("*.py"))}
    graph: dict[str, set[str]] = {}
    for name, path in files.items():
        found = graph.setdefault(name, set())
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                full = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                full = [f"{node.module}.{alias.name}" for alias in node.names]
            else:
                continue
            for target in full:
                parts = target.split(".")[1:] if target.split(".")[0] == "unmoved" else []
                modules = (".".join(parts[:n]) for n in range(len(parts), 0, -1))
                found.update(itertools.islice((module for module in modules if module in files), 1))
        found.discard(name)
    return graph


def climbs(graph: dict[str, set[str]]) -> list[str]:
    """The imports of a package of the same rank or a later one, and of facades."""
    found = []
    for name, targets in graph.items():
        own = name.split(".")[0]
        for target in sorted(targets) if own in RANK else ():
            other = target.split(".")[0]
            if other != own and RANK.get(other, len(RANKS)) >= RANK[own]:
                found.append(f"{name} imports {target}")
    return found


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """The sets of modules that import each other, directly or through others."""
    names = sorted(graph)
    matrix = scipy.sparse.lil_matrix((len(names), len(names)), dtype=bool)
    for name, targets in graph.items():
        for target in targets:
            matrix[names.index(name), names.index(target)] = True
    _, component = scipy.sparse.csgraph.connected_components(matrix, connection="strong")
    found: dict[int, list[str]] = {}
    for name, number in zip(names, component, strict=True):
        found.setdefault(int(number), []).append(name)
    return [members for members in found.values() if len(members) > 1]


def long_functions(package: Path) -> dict[str, int]:
    """The functions longer than they should be, and their lines."""
    return {
        f"{dotted(path, package)}.{node.name}": length
        for path in package.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef)
        and (length := (node.end_lineno or 0) - node.lineno + 1) > MOST_LINES_OF_A_FUNCTION
    }


GRAPH = imports(PACKAGE)
FILES = sorted(path for path in PACKAGE.rglob("*.py") if path.parent != PACKAGE or path.stem != "__init__")


def test_every_module_is_in_a_package_or_a_facade() -> None:
    assert {path.stem for path in PACKAGE.glob("*.py")} == {"__init__", "__main__", *LOOSE, *FACADES}
    folders = {path.name for path in PACKAGE.iterdir() if path.is_dir()} - {"__pycache__", *FILES_ALONE}
    assert folders == RANK.keys() - {*LOOSE}
    for name in FACADES:
        tree = ast.parse((PACKAGE / f"{name}.py").read_text(encoding="utf-8"))
        assert [type(node) for node in tree.body if not isinstance(node, ast.ImportFrom)] == [ast.Expr, ast.Assign]


def test_imports_run_one_way() -> None:
    assert climbs(GRAPH) == []


def test_there_are_no_circles() -> None:
    assert circles(GRAPH) == []


def test_functions_stay_short() -> None:
    assert long_functions(PACKAGE) == LONG


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_files_stay_small(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= MOST_LINES


@pytest.fixture
def planted(tmp_path: Path) -> Path:
    """A package of two rooms in order."""
    for name, text in {
        "core/errors.py": "class Error(Exception): ...\n",
        "core/views.py": "from unmoved.core.errors import Error\n",
        "terms/kl.py": "from unmoved.core import views\nfrom unmoved.core.errors import Error\n",
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    graph = imports(tmp_path)
    assert graph["terms.kl"] == {"core.views", "core.errors"}
    assert (climbs(graph), circles(graph), long_functions(tmp_path)) == ([], [], {})
    return tmp_path


@pytest.mark.parametrize(
    "line",
    [
        "import unmoved.terms.kl",
        "from unmoved.terms import kl",
        "from unmoved.terms.kl import KL",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from unmoved.terms.kl import KL",
        "def f():\n    try:\n        from unmoved.terms import kl\n    except ImportError:\n        pass",
    ],
)
def test_a_planted_climb_and_a_planted_circle_are_seen(planted: Path, line: str) -> None:
    (planted / "core" / "errors.py").write_text(line + "\n")
    graph = imports(planted)
    assert climbs(graph) == ["core.errors imports terms.kl"]
    assert circles(graph) == [["core.errors", "core.views", "terms.kl"]]


def test_a_planted_circle_within_a_package_is_seen(planted: Path) -> None:
    (planted / "core" / "errors.py").write_text("def f():\n    from unmoved.core.views import Views\n")
    assert circles(imports(planted)) == [["core.errors", "core.views"]]


def test_a_planted_long_function_and_a_facade_that_is_used_are_seen(planted: Path) -> None:
    (planted / "core" / "errors.py").write_text("def long():\n" + "    pass\n" * 60)
    (planted / "terms" / "kl.py").write_text("from unmoved.weights import perturbed\n")
    (planted / "weights.py").write_text("")
    assert long_functions(planted) == {"core.errors.long": 61}
    assert climbs(imports(planted)) == ["terms.kl imports weights"]


def test_no_relative_imports() -> None:
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            assert not (isinstance(node, ast.ImportFrom) and node.level), path


def test_files_are_ascii() -> None:
    for path in FILES:
        assert path.read_text(encoding="utf-8").isascii(), path


def test_no_two_files_of_tests_have_one_name() -> None:
    """pytest would take the second for the first, and end before any test."""
    names = Counter(path.name for path in (ROOT / "tests").rglob("test_*.py"))
    assert [name for name, count in names.items() if count > 1] == []


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
        "import unmoved.runs.train, unmoved.runs.evaluate, unmoved.experiments.compare\n"
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


@pytest.mark.parametrize(
    "name", ["attacks", "data", "defenses", "interop", "models", "optim", "terms", "testing", "weights"]
)
def test_namespaces_export_what_they_name(name: str) -> None:
    namespace = getattr(unmoved, name)
    for export in getattr(namespace, "__all__", []):
        assert getattr(namespace, export) is not None
        assert (getattr(namespace, export).__doc__ or "").strip(), export
