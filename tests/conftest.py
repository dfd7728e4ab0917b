"""Shared by all tests: one thread a process, so that a pool of test processes does not fight over the cores."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)
ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def shared_data() -> Path:
    """The folder with MNIST and the JPEG copy of CIFAR-10; tests that need it are skipped without it."""
    path = Path(os.environ.get("UNMOVED_DATA", ROOT.parent / "shared" / "data"))
    if not path.is_dir():
        pytest.skip(f"no data folder at {path}; set UNMOVED_DATA")
    return path
