"""The recipe for one GPU, in miniature: it trains as it is written, with few images and a narrow network."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from unmoved.runs.recipe import read
from unmoved.runs.train import train_recipe

SMALL = ["data.use=arrays", "model.width=1", "training.epochs=2", "training.validation=12", "training.batch_size=16"]


@pytest.mark.parametrize(
    "attack", [[], ['attack={use="nfgsm"}'], ['attack={use="prior_fgsm"}']], ids=["pgd", "nfgsm", "prior_fgsm"]
)
def test_cifar10_fast_trains_in_miniature(attack: list[str], tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    x, y = draw.integers(0, 256, (60, 32, 32, 3), dtype=np.uint8), np.arange(60) % 10
    np.savez(tmp_path / "few.npz", x_train=x[:48], y_train=y[:48], x_test=x[48:], y_test=y[48:])
    asked = read("cifar10/fast", [*SMALL, f"data.path={tmp_path / 'few.npz'}", "data.layout=NHWC", *attack])
    assert "Not run by us yet: no figure to state." in (asked.description or "")
    run = train_recipe(asked, tmp_path / "run", device="cpu")
    log = run.metrics
    assert list(log["epoch"]) == [1, 2]
    assert list(log["lr"]) == [0.05, 0.05]
    assert np.allclose(log["eps"], 8 / 255)
    assert list(log["validation_n"]) == [12, 12]
    state = run.load_state()
    assert state is not None
    assert state.get("average") is not None
    assert state.get("good") is not None
