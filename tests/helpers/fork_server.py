"""Real processes that run the command, to be killed: torch is imported once and each command is a fork."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

# Imports torch once and forks a process for each command: a start costs nothing, a kill is a kill.
NURSERY = """
import json, os, sys
import lightning_fabric, torch
from unmoved import cli
from unmoved.analyses import studies
from unmoved.experiments import compare
from unmoved.runs import evaluate, train
from unmoved.runs.assembly import Assembly
from unmoved.runs.recipe import read
from unmoved.training import loop
torch.set_num_threads(1)
print("ready", flush=True)
for line in sys.stdin:
    child = os.fork()
    if child == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.argv = ["unmoved", *json.loads(line)]
        try:
            cli.main()
        except SystemExit as end:
            os._exit(end.code or 0)
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class Nursery:
    """Starts real processes that run the command."""

    def __init__(self, errors: Path) -> None:
        self.errors = errors
        with errors.open("w") as stderr:
            self.process = subprocess.Popen(
                [sys.executable, "-c", NURSERY],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
                env=os.environ | {"OMP_NUM_THREADS": "1"},
            )
        assert self._line() == "ready"

    def _line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def start(self, *arguments: object) -> int:
        """The process that does it, one at a time; `wait` for its end."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(list(map(str, arguments))) + "\n")
        self.process.stdin.flush()
        return int(self._line())

    def wait(self) -> int:
        """The exit code; minus nine where the process was killed before it ended."""
        return int(self._line())

    def run(self, *arguments: object, kill_after: float | None = None) -> int:
        """Start and wait, with a kill in between where one is asked for."""
        child = self.start(*arguments)
        if kill_after is not None:
            time.sleep(kill_after)
            with contextlib.suppress(ProcessLookupError):  # it has ended by itself
                os.kill(child, signal.SIGKILL)
        return self.wait()

    def close(self) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        self.process.wait(timeout=60)
        self.process.stdout.close()
