"""Jobs whose processes die as often as they are told to."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Task:
    """Notes in its file which processes tried it; the first ``deaths`` of them kill themselves."""

    path: Path
    deaths: int = 0
    error: str = ""
    seconds: float = 0.0

    def tries(self) -> list[int]:
        return [int(line) for line in self.path.read_text().splitlines()] if self.path.exists() else []


def act(task: Task) -> None:
    with task.path.open("a") as file:
        file.write(f"{os.getpid()}\n")
    time.sleep(task.seconds)
    if len(task.tries()) <= task.deaths:
        os.kill(os.getpid(), signal.SIGKILL)
    if task.error:
        raise ValueError(task.error)


def alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    # A dead one whose new parent has not looked at it yet is there in name only.
    status = Path(f"/proc/{process}/stat")
    return not (status.exists() and status.read_text().rpartition(")")[2].split()[0] == "Z")
