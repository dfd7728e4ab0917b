"""`compare --on ray` where no cluster runs: it starts one of its own, which dies with it, however the command ends.

Ray's start takes most of the time, and another Ray beside it makes it longer; so this is not part of the suite.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import uuid
from contextlib import suppress
from pathlib import Path

import pytest
from experiments.test_ray_cluster import BUSY, PATIENCE, end_of
from helpers.cli import recipe
from helpers.deadly_jobs import alive

from unmoved.core.errors import UnmovedError
from unmoved.runs.folder import Run

pytestmark = pytest.mark.slow


def offspring(process: int) -> dict[int, str]:
    """All processes below one, with their titles."""
    below: dict[int, list[int]] = {}
    titles: dict[int, str] = {}
    for entry in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has ended
            parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            below.setdefault(parent, []).append(int(entry.name))
            titles[int(entry.name)] = (entry / "cmdline").read_bytes().decode(errors="replace")
    found = list(below.get(process, []))
    for child in found:
        found += below.get(child, [])
    return {child: titles[child] for child in found}


def unlocked(run: Run) -> None:
    """Nobody keeps it locked, once the last thread of its process is gone."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        with suppress(UnmovedError), run.alone():
            return
        time.sleep(0.02)
    raise AssertionError(f"{run.path} is still locked")


def test_where_there_is_no_cluster_one_is_started_without_a_word_and_dies_with_the_command(tmp_path: Path) -> None:
    path, log = recipe(tmp_path), tmp_path / "out" / f"{tmp_path.name}-tiny" / "seed0" / "metrics.jsonl"
    command = [sys.executable, "-c", "from unmoved.cli import main; main()", "compare", str(path), "--out"]
    command += [str(tmp_path / "out"), "--on", "ray", "--ray-address", "local", "--set", "training.epochs=100000"]
    environment = os.environ | {"RAY_AUTH_TOKEN": uuid.uuid4().hex, "OMP_NUM_THREADS": "1"}
    environment["RAY_worker_niceness"] = "0"  # Ray is polite, and its worker would wait for the tests beside this one
    with (tmp_path / "said").open("w") as said:
        process = subprocess.Popen(command, env=environment, stdout=said, stderr=said)
    below: dict[int, str] = {}
    try:
        deadline = time.monotonic() + PATIENCE
        while not log.exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        below = offspring(process.pid)
        if BUSY in (tmp_path / "said").read_text():
            pytest.skip("this machine is too busy for Ray")
        assert log.exists()
        (worker,) = (child for child, title in below.items() if title.startswith("ray::run"))
        process.send_signal(signal.SIGKILL)
        process.wait(timeout=PATIENCE)
        end_of([worker])
        unlocked(Run(log.parent))
        assert (tmp_path / "said").read_text() == ""
    finally:  # Ray's agents, which hold nothing of ours, would outlive their cluster by a minute or two
        process.kill()
        for child in filter(alive, below):
            with suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
        process.wait(timeout=PATIENCE)
        end_of(list(below))
