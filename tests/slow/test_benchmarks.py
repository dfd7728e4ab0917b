"""The benchmark for a GPU runs here in miniature, every line of it, and says what it needs where there is none."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.cli import ROOT

pytestmark = pytest.mark.slow
VARIANTS = {"reference", "float32", "bf16", "bf16, contiguous", "bf16, compiled"}


def gpu(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "error", str(ROOT / "benchmarks" / "gpu.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})


def test_the_miniature_runs_every_variant_method_and_bar(tmp_path: Path) -> None:
    done = gpu("--dry", "--device", "cpu", "--out", tmp_path / "gpu.json")
    assert done.returncode == 0, done.stderr
    facts = json.loads((tmp_path / "gpu.json").read_text())
    assert facts["miniature"]
    assert {"cores", "processor"} <= facts["hardware"].keys()
    assert facts["versions"]["torch"] == torch.__version__
    rows = facts["rows"]
    assert [row["failed"] for row in rows if "failed" in row] == []
    assert {(row["method"], row["variant"]) for row in rows} == {(m, v) for m in ("AT", "TRADES") for v in VARIANTS}
    for row in rows:
        # An epoch is extrapolated from the rate: 12 images in batches of 4.
        assert row["seconds_per_epoch"] == pytest.approx(12 / row["images_per_second"])
        assert (row["strength"] is None) == (row["variant"] == "reference")
        assert row["strength"] is None or math.isfinite(row["strength"])  # so small, an attack may lose
    assert len(facts["methods"]) == 12
    bars = [("AT", 10), ("TRADES", 12), ("AT", 4), ("TRADES", 4)]
    assert [(bar["method"], bar["bar"]) for bar in facts["bars"]] == bars
    assert done.stdout.count("in miniature") == 4, "its figures are no bars reached or missed"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_one_sentence_says_so(tmp_path: Path) -> None:
    done = gpu("--out", tmp_path / "gpu.json")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.splitlines() == [
        "gpu.py: no GPU that torch can use; `--dry --device cpu` runs every line in miniature"
    ]
    assert not (tmp_path / "gpu.json").exists()
