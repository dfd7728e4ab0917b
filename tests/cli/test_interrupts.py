"""Ctrl-C in a terminal, which reaches all processes, or a signal to the first alone: one message, no process left."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers.cli import recipe

if not sys.platform.startswith("linux"):
    pytest.skip("these tests look for processes in /proc", allow_module_level=True)

# What started the tests may ignore it, and they inherit that.
BEGIN = "import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL); os.execv(sys.executable, sys.argv[1:])"
LONG = ("--set", "training.epochs=100000")
COMMANDS = {
    "compare": ("compare", "tiny.toml", "--seeds", "0,1", "--workers", "2", "--out", "run", *LONG),
    "devices": ("train", "tiny.toml", "--devices", "2", "--out", "run", "--device", "cpu", *LONG),
}


def session(leader: int) -> list[int]:
    """The processes of a session, those aside that have ended and wait to be asked how."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, *numbers = path.read_text().rpartition(")")[2].split()
        except OSError:  # it ended meanwhile
            continue
        if int(numbers[2]) == leader and state != "Z":
            found.append(int(path.parent.name))
    return found


def imports_torch(process: int) -> bool:
    """Whether a process has begun to import torch, which takes it a second or more."""
    try:
        return "libtorch" in Path(f"/proc/{process}/maps").read_text()
    except OSError:  # it ended meanwhile
        return False


@pytest.mark.parametrize(
    ("name", "reached"),
    [
        ("compare", "all"),
        ("devices", "first"),
        pytest.param("compare", "first", marks=pytest.mark.slow),
        pytest.param("devices", "all", marks=pytest.mark.slow),
    ],
)
def test_an_interruption_ends_all_processes_in_one_message(tmp_path: Path, name: str, reached: str) -> None:
    """One that reaches all comes while they start, when each would have something of its own to say."""
    recipe(tmp_path)
    process = subprocess.Popen(
        [sys.executable, "-c", BEGIN, sys.executable, "-m", "unmoved", *COMMANDS[name]],
        cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        deadline = time.monotonic() + 120
        while process.poll() is None and not (
            any(map(imports_torch, {*session(process.pid)} - {process.pid}))
            if reached == "all"
            else list(tmp_path.rglob("metrics.jsonl"))
        ):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        assert len(session(process.pid)) > 1
        (os.killpg if reached == "all" else os.kill)(process.pid, signal.SIGINT)
        _, said = process.communicate(timeout=60)
    finally:
        for number in session(process.pid):
            os.kill(number, signal.SIGKILL)
    assert process.returncode == 130, said
    words = ["unmoved", *COMMANDS[name]] + ["--resume"] * ((name, reached) == ("devices", "first"))
    last = said[said.index("interrupted; ") :]
    assert last.splitlines()[1:] == [f"  {shlex.join(words)}"], "and nothing after it"
    assert "Traceback" not in said
