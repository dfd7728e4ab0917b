"""kill -9 at random moments of every command that works for long: going on ends in the bits of a run nobody disturbed.

At least 64 kills of real processes, at fixed draws of moments over the time that the undisturbed command takes;
a command that was done before its kill is compared, and begun anew.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.cli import RECIPE, digests, recipe
from helpers.fork_server import Nursery

from unmoved.runs.folder import Run

if not sys.platform.startswith("linux"):
    pytest.skip("these tests fork, and look for processes in /proc", allow_module_level=True)
pytestmark = pytest.mark.slow

METHODS = {
    "at": (RECIPE, []),
    "awp": (RECIPE + '\n[defense]\nuse = "awp"\n', []),
    "without validation": (RECIPE, ["--set", "training.validation=0"]),
}
CLOCKS = ("seconds", "started", "finished")


@pytest.fixture(scope="module")
def nursery(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nursery]:
    nursery = Nursery(tmp_path_factory.mktemp("nursery") / "errors")
    yield nursery
    nursery.close()
    # Python itself says what semaphores a killed parent of processes has left.
    said = [line for line in nursery.errors.read_text().splitlines() if "resource_tracker" not in line]
    said = [line for line in said if not line.startswith("  warnings.warn(")]
    assert said == [], "no warning, no refusal, no stray word in all the runs and kills"


def kill_often(
    nursery: Nursery,
    command: list[object],
    kills: int,
    draw: random.Random,
    seconds: float,
    anew: Callable[[], None],
    compare: Callable[[], None],
) -> None:
    """Kill the command so often, going on after each kill; ``compare`` what it ends in."""
    anew()
    while kills:
        code = nursery.run(*command, kill_after=draw.uniform(0.02, 0.9) * seconds)
        assert code in (-signal.SIGKILL, 0)
        kills -= code != 0
        if code == 0:
            compare()
            anew()
    assert nursery.run(*command) == 0
    compare()


def timed(nursery: Nursery, *command: object) -> float:
    began = time.monotonic()
    assert nursery.run(*command) == 0
    return time.monotonic() - began


def timeless(value: Any) -> Any:
    return {key: part for key, part in value.items() if key not in CLOCKS} if isinstance(value, dict) else value


def left_over(run: Path) -> list[Path]:
    return [*run.rglob("*.tmp"), *run.rglob(".lock"), *run.rglob("journal.jsonl")]


def same_training(one: Path, two: Path) -> None:
    for name in ("best.safetensors", "last.safetensors", "recipe.toml"):
        assert (one / name).read_bytes() == (two / name).read_bytes(), name
    assert Run.open(one).metrics.drop(columns="seconds").equals(Run.open(two).metrics.drop(columns="seconds"))
    assert left_over(one) == []


def same_evaluation(one: Path, two: Path) -> None:
    for name in ("outcomes.csv", "curve.csv"):
        assert (one / "evaluation" / name).read_bytes() == (two / "evaluation" / name).read_bytes(), name
    ours, theirs = Run.open(one), Run.open(two)
    assert timeless(ours.evaluation) == timeless(theirs.evaluation)
    assert ours.gallery is not None
    assert theirs.gallery is not None
    assert all(np.array_equal(ours.gallery[name], theirs.gallery[name]) for name in theirs.gallery)
    assert ours.doctor == theirs.doctor
    assert left_over(one) == []


def remove(*folders: Path) -> None:
    for folder in folders:
        if folder.exists():
            shutil.rmtree(folder)


# --- train


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("seed", [0, 1])
def test_train(nursery: Nursery, tmp_path: Path, method: str, seed: int) -> None:
    text, changes = METHODS[method]
    command = ["train", recipe(tmp_path, text), "--resume", *changes]
    command += ["--set", "training.epochs=12", "--set", f"training.seed={seed}", "--out"]
    run, uncut = tmp_path / "run", tmp_path / "uncut"
    seconds = timed(nursery, *command, uncut)
    kill_often(
        nursery,
        [*command, run],
        4,
        random.Random(f"train {method} {seed}"),
        seconds,
        lambda: remove(run),
        lambda: same_training(run, uncut),
    )


# --- evaluate


@pytest.fixture(scope="module")
def trained(nursery: Nursery, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    assert nursery.run("train", recipe(folder), "--out", folder / "run", "--set", "training.epochs=8") == 0
    return folder / "run"


@pytest.mark.parametrize(
    ("attacks", "more"),
    [
        ("recipe", ("--n", 200)),
        ("quick,fab", ("--n", 60, "--no-doctor")),
        ("square,apgd", ("--n", 16, "--save-adversarial")),
    ],
)
def test_evaluate(nursery: Nursery, trained: Path, tmp_path: Path, attacks: str, more: tuple[object, ...]) -> None:
    run, uncut = tmp_path / "run", Path(shutil.copytree(trained, tmp_path / "uncut"))
    options = ["--attacks", attacks, "--batch-size", 4, *more]
    seconds = timed(nursery, "evaluate", uncut, *options)

    def anew() -> None:
        remove(run)
        shutil.copytree(trained, run)

    def compare() -> None:
        same_evaluation(run, uncut)
        kept = [f / "evaluation" / "adversarial" for f in (run, uncut)]
        assert digests(kept[0]) == digests(kept[1])

    draw = random.Random(f"evaluate {attacks}")
    kill_often(nursery, ["evaluate", run, *options], 5, draw, seconds, anew, compare)


# --- analyze


@pytest.fixture(scope="module")
def grid(nursery: Nursery, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two radii, each on two disjoint halves of the data, judged."""
    folder = tmp_path_factory.mktemp("grid")
    sweep = ("--sweep", "attack.eps=0.05,0.1", "--splits", 2, "--set", "name=tiny", "--workers", 2)
    assert nursery.run("compare", recipe(folder), *sweep, "--out", folder / "out") == 0
    return sorted(path.parent for path in folder.glob("out/*/*/recipe.toml"))


@pytest.mark.parametrize("what", ["softmax", "corruption", "bias-variance", "tradeoff"])
def test_analyze(nursery: Nursery, grid: list[Path], tmp_path: Path, what: str) -> None:
    out, uncut = tmp_path / "out", tmp_path / "uncut"

    def anew() -> None:
        remove(out, *(run / "analysis" for run in grid))

    def compare() -> None:
        assert digests(out / what) == digests(uncut / what)
        assert any(name.endswith(".csv") for name in digests(out / what))

    anew()
    seconds = timed(nursery, "analyze", what, *grid, "--n", 60, "--out", uncut)
    draw = random.Random(f"analyze {what}")
    kill_often(nursery, ["analyze", what, *grid, "--n", 60, "--out", out], 4, draw, seconds, anew, compare)


# --- compare


def workers_of(parent: int) -> list[int]:
    found = []
    for folder in Path("/proc").iterdir():
        with contextlib.suppress(OSError, ValueError):
            if int((folder / "stat").read_text().rpartition(")")[2].split()[1]) == parent:
                found += [int(folder.name)] * (b"spawn_main" in (folder / "cmdline").read_bytes())
    return sorted(found)


def changed(out: Path) -> float:
    """When something was written last."""
    with contextlib.suppress(OSError):  # a file that was there a moment ago
        return max((path.stat().st_mtime for path in out.rglob("*")), default=0.0)
    return time.time()


@pytest.fixture(scope="module")
def compared(nursery: Nursery, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[object], Path, float]:
    """(the command less its folder, what it makes undisturbed, the seconds of that once torch is imported)."""
    folder = tmp_path_factory.mktemp("compared")
    one = recipe(folder, RECIPE, "one")
    two = recipe(folder, RECIPE.replace("[objective.ce]", "[objective.trades]"), "two")
    command = ["compare", one, two, "--workers", 2, "--analyze", "softmax", "--analysis-n", 40]
    command += ["--set", "training.epochs=10", "--set", "evaluation.n=60", "--out"]
    assert nursery.run(*command, folder / "uncut") == 0
    first = min(path.stat().st_mtime for path in folder.rglob("recipe.toml"))
    return command, folder / "uncut", time.time() - first


def start_and_see_it_work(nursery: Nursery, command: list[object], out: Path) -> int:
    """The process of the command, whose workers have written something new (or which is done already)."""
    began = time.time()
    parent = nursery.start(*command, out)
    while changed(out) < began and (Path("/proc") / str(parent)).exists():
        time.sleep(0.01)
    return parent


def test_compare_whose_parent_is_killed(
    nursery: Nursery, compared: tuple[list[object], Path, float], tmp_path: Path
) -> None:
    (command, uncut, seconds), out, kills = compared, tmp_path / "out", 0
    draw = random.Random("compare, parent")
    while kills < 6:
        parent = start_and_see_it_work(nursery, command, out)
        time.sleep(draw.uniform(0.0, 0.6) * seconds)
        with contextlib.suppress(ProcessLookupError):
            os.kill(parent, signal.SIGKILL)
        code = nursery.wait()
        assert code in (0, -signal.SIGKILL), "no run failed: no worker of the killed one is still there"
        kills += code != 0
        if code == 0:
            same_grid(out, uncut)
            remove(out)
    assert nursery.run(*command, out) == 0
    same_grid(out, uncut)


@pytest.mark.parametrize("moment", [0.0, 0.2, 0.4])
def test_compare_whose_worker_is_killed(
    nursery: Nursery, compared: tuple[list[object], Path, float], tmp_path: Path, moment: float
) -> None:
    (command, uncut, seconds), out = compared, tmp_path / "out"
    draw, killed = random.Random(f"compare, worker {moment}"), False
    while not killed:
        parent = start_and_see_it_work(nursery, command, out)
        time.sleep((moment + draw.uniform(0.0, 0.2)) * seconds)
        with contextlib.suppress(ProcessLookupError, IndexError):  # there is none any more
            os.kill(draw.choice(workers_of(parent)), signal.SIGKILL)
            killed = True
        assert nursery.wait() == 0, "a second chance, and no run failed"
        same_grid(out, uncut)
        if not killed:  # its workers were gone already: sooner, then
            moment *= 0.7
            remove(out)


def same_grid(out: Path, uncut: Path) -> None:
    names = [{path.parent.relative_to(folder) for path in folder.glob("*/*/recipe.toml")} for folder in (out, uncut)]
    assert names[0] == names[1]
    assert len(names[0]) == 2
    for name in names[0]:
        same_training(out / name, uncut / name)
        same_evaluation(out / name, uncut / name)
    tables = [
        {name: digest for name, digest in digests(folder / "analysis").items() if name.endswith(".csv")}
        for folder in (out, uncut)
    ]
    assert tables[0] == tables[1] != {}
    assert (out / "report.html").exists()
