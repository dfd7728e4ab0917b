"""Shared by all tests: one thread a process, so that a pool of test processes does not fight over the cores, and the
files that take minutes first, so that no worker is left alone with one of them at the end.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)
ROOT = Path(__file__).resolve().parents[1]
# Few tests, but they train, start processes and kill them.
LONG = (
    "test_evaluate",
    "test_ray_cluster",
    "test_studies",
    "test_combinations",
    "test_compare",
    "test_processes",
    "test_resume",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long files first; the rest stays in its order (xdist's own order, most tests first, puts them last).

    Raises:
        UsageError: a name with an address in memory, which is another one in each of xdist's processes.
    """
    if fleeting := [item.nodeid for item in items if " at 0x" in item.nodeid]:
        raise pytest.UsageError(f"expected names that do not change, came {fleeting[0]}; give its parameters ids")
    items.sort(key=lambda item: LONG.index(item.path.stem) if item.path.stem in LONG else len(LONG))


@pytest.fixture
def shared_data() -> Path:
    """The folder with MNIST and the JPEG copy of CIFAR-10; tests that need it are skipped without it."""
    path = Path(os.environ.get("UNMOVED_DATA", ROOT.parent / "shared" / "data"))
    if not path.is_dir():
        pytest.skip(f"no data folder at {path}; set UNMOVED_DATA")
    return path
