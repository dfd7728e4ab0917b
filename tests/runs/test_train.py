"""A recipe that is trained is the call of `train` that it says, with every setting."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.cli import recipe
from torch import nn

from unmoved import Method, ThreatModel, train
from unmoved.attacks import PGD
from unmoved.core.precision import resolve
from unmoved.data import augmentation, digits
from unmoved.models import linear
from unmoved.runs.recipe import read
from unmoved.runs.train import train_recipe
from unmoved.terms import CE
from unmoved.training.averaging import EMA
from unmoved.training.optim import SGD, Constant, Cosine

TEXT = """
[data]
use = "digits"
test = 1600

[model]
use = "linear"

[threat]
norm = "linf"
eps = 0.1

[training]
epochs = 2
batch_size = 50
validation = 40
seed = 3
augment = "crop1"
precision = "PRECISION"

[optimizer]
use = "sgd"
lr = 0.5
momentum = 0.5

[schedule]
use = "cosine"

[average]
use = "ema"
decay = 0.5

[attack]
use = "pgd"
steps = 1

[objective.ce]

[validation]
use = "pgd"
steps = 0
start = "none"
"""
PRECISION = "float32" if resolve("auto", "cpu") == "bf16" else "bf16"  # what it would not be by itself
THREAT = ThreatModel("linf", 0.1)
PART, HELD_OUT = digits(test=1600).train.hold_out(40, seed=0)
SETTINGS: dict[str, Any] = {
    "check": PGD(THREAT, steps=0, start="none"),
    "optimizer": SGD(lr=0.5, momentum=0.5),
    "schedule": Cosine(),
    "augment": augmentation("crop1"),
    "average": EMA(decay=0.5),
    "precision": PRECISION,
    "seed": 3,
    "batch_size": 50,
    "epochs": 2,
}
OTHERS: dict[str, Any] = {
    "check": PGD(THREAT, steps=2),
    "optimizer": SGD(lr=0.5),
    "schedule": Constant(),
    "augment": None,
    "average": None,
    "precision": "auto",
    "seed": 4,
    "batch_size": 64,
    "epochs": 3,
}


def by_hand(**settings: Any) -> tuple[list[dict[str, Any]], nn.Module]:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = linear((1, 8, 8), 10)
    method = Method(PGD(THREAT, steps=1, seed=3), CE())
    return train(model, method, PART, validation=HELD_OUT, threat=THREAT, device="cpu", **settings), model


def facts(log: list[dict[str, Any]]) -> list[tuple[Any, ...]]:
    names = ("step", "lr", "loss", "validation_clean", "validation_robust")
    return [tuple(line[name] for name in names) for line in log]


def test_a_recipe_is_trained_as_it_says(tmp_path: Path) -> None:
    run = train_recipe(read(recipe(tmp_path, TEXT.replace("PRECISION", PRECISION))), tmp_path / "run", device="cpu")
    log, model = by_hand(**SETTINGS)
    assert facts(run.metrics.to_dict("records")) == facts(log)
    made = linear((1, 8, 8), 10)
    run.load_weights(made, "last")
    assert all(torch.equal(*pair) for pair in zip(made.parameters(), model.parameters(), strict=True))


@pytest.mark.parametrize("name", SETTINGS)
def test_none_of_its_settings_is_idle(name: str) -> None:
    """Another value of each shows in the log: so that the test above would see it."""
    assert facts(by_hand(**SETTINGS | {name: OTHERS[name]})[0]) != facts(by_hand(**SETTINGS)[0])
