"""Real processes, really killed: whatever the moment, going on with --resume ends in the same bits."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.cli import RECIPES, digests, unmoved
from helpers.fork_server import Nursery

from unmoved.core.errors import UnmovedError
from unmoved.runs import recipe, train
from unmoved.runs.folder import Run

if not hasattr(os, "fork"):
    pytest.skip("these tests fork", allow_module_level=True)

RECIPE = RECIPES / "digits" / "trades_awp.toml"
SMALL = ["training.epochs=5", "model.width=4", "data.test=1500", "attack.steps=1", "training.batch_size=32"]
SMALL += ["training.checkpoint_share=1"]  # a state of each epoch
COMMAND = ["train", str(RECIPE), *(part for change in SMALL for part in ("--set", change))]


@pytest.fixture(scope="module")
def nursery(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nursery]:
    nursery = Nursery(tmp_path_factory.mktemp("nursery") / "errors")
    yield nursery
    nursery.close()


@pytest.fixture(scope="module")
def uncut(nursery: Nursery, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float]:
    """The run that nobody interrupts, and the seconds it takes."""
    folder, began = tmp_path_factory.mktemp("uncut") / "run", time.monotonic()
    assert nursery.run(*COMMAND, "--out", folder) == 0
    return folder, time.monotonic() - began


def same(one: Path, two: Path) -> None:
    """The same weights, bit for bit, and the same log but for the clock."""
    for name in ("last.safetensors", "best.safetensors", "recipe.toml"):
        assert (one / name).read_bytes() == (two / name).read_bytes(), name
    logs = [Run.open(folder).metrics.drop(columns="seconds") for folder in (one, two)]
    assert logs[0].equals(logs[1])
    states = [Run.open(folder).load_state() for folder in (one, two)]
    for key in states[0].keys() - {"log", "record"}:
        assert repr(states[0][key]) == repr(states[1][key]), key


def test_a_finished_run_on_several_machines_still_meets_them(
    uncut: tuple[Path, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first would leave with nothing to do, and the others wait for it until their timeout."""
    met: list[int] = []

    def prepare(device: str, devices: int, nodes: int) -> None:
        met.append(nodes)
        raise UnmovedError("met")

    monkeypatch.setattr(train.distributed, "prepare", prepare)
    asked = recipe.read(RECIPE, SMALL)
    assert train.train_recipe(asked, uncut[0], resume=True).path == uncut[0]
    assert met == []
    with pytest.raises(UnmovedError, match="met"):
        train.train_recipe(asked, uncut[0], resume=True, nodes=2)
    assert met == [2]


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_killed_at_random_moments_the_end_is_the_same(
    nursery: Nursery, uncut: tuple[Path, float], tmp_path: Path, seed: int
) -> None:
    finished, seconds = uncut
    moments, run, kills = random.Random(seed), tmp_path / "run", 0
    while kills < 4:
        code = nursery.run(*COMMAND, "--out", run, "--resume", kill_after=moments.uniform(0.05, 0.4) * seconds)
        assert code in (-signal.SIGKILL, 0)
        kills += 1
        if code == 0:  # it was done before its last kill: once more from the start, and sooner
            shutil.rmtree(run)
            kills, seconds = 0, 0.6 * seconds
    assert nursery.run(*COMMAND, "--out", run, "--resume") == 0
    same(run, finished)


def test_the_real_command_killed_after_its_first_epoch(uncut: tuple[Path, float], tmp_path: Path) -> None:
    """Without the nursery, and resumed in this process: another process, the same bits."""
    run = tmp_path / "run"
    process = subprocess.Popen(
        [sys.executable, "-m", "unmoved", *COMMAND, "--out", str(run)],
        stdout=subprocess.DEVNULL,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    deadline = time.monotonic() + 120
    while not (run / "trainer.pt").exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait(timeout=60) == -signal.SIGKILL
    assert 1 <= Run.open(run).load_state()["epochs"] < 5
    unmoved("evaluate", run, "--n", "5").fine()  # what is there can be judged
    unmoved(*COMMAND, "--out", run, "--resume").fine()
    same(run, uncut[0])


def test_resume_of_a_finished_run_changes_nothing(nursery: Nursery, uncut: tuple[Path, float]) -> None:
    finished, _ = uncut
    before = digests(finished)
    assert nursery.run(*COMMAND, "--out", finished, "--resume") == 0
    assert digests(finished) == before
    assert nursery.errors.read_text() == ""  # all runs and kills so far: no warning, no stray word
    assert nursery.run(*COMMAND, "--out", finished) == 1
    said = nursery.errors.read_text()
    assert said.startswith("error: ")
    assert said.count("\n") == 1
    assert digests(finished) == before
