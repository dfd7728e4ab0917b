"""Jobs for workers of a cluster, which import this file: it loads nothing heavy."""

from __future__ import annotations

import os
from pathlib import Path

from unmoved.core.errors import UnmovedError
from unmoved.experiments.local_pool import JobError


def mistaken(path: Path) -> None:
    raise UnmovedError(f"expected another path, came {path.name}")


def failed(path: Path) -> None:
    raise JobError(f"OddError: odd (traceback in {path})")


def look(path: Path) -> None:
    path.write_text(f"{os.getcwd()}\n{os.environ['CUDA_VISIBLE_DEVICES']}")
