"""No setting of an attack is idle: another value of each, another seed, step or restart ends in other images."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from torch import nn

from unmoved.attacks import APGD, FAB, FMN, NFGSM, PGD, SPSA, Friendly, HopSkipJump, Square
from unmoved.attacks.odi import DiversifiedPGD
from unmoved.attacks.rounds import rounds_of
from unmoved.core.batch import Batch
from unmoved.core.threat import ThreatModel
from unmoved.terms import DLR, Margin, TargetedMargin

LINF, WIDE, L2 = ThreatModel("linf", 0.05), ThreatModel("linf", 0.15), ThreatModel("l2", 0.5)
SOFT: dict[str, Any] = {"smooth": 1.0}
# An attack that uses all of its settings, and another value of each.
CASES: list[tuple[Any, dict[str, Any]]] = [
    (
        PGD(LINF, steps=5, step_size=0.08, restarts=2, keep="best"),
        {"loss": Margin(), "steps": 6, "step_size": 0.01, "start": "gaussian", "restarts": 1, "keep": "last", "seed": 1}
        | {"mode": "train", "stop": Friendly(0)}
        | SOFT,
    ),
    (NFGSM(LINF), {"loss": DLR(), "k": 1.0, "step_size": 0.01, "seed": 1, "mode": "train"}),
    (
        APGD(WIDE, steps=5, restarts=2),
        {"loss": Margin(), "steps": 6, "restarts": 1, "seed": 1, "until_broken": True} | SOFT,
    ),
    (APGD(LINF, TargetedMargin(), steps=5, targets=1), {"targets": 2}),
    (APGD(ThreatModel("l1", 2.0), steps=10), {"large_first": True}),
    (
        DiversifiedPGD(LINF, steps=5, restarts=2),
        {"loss": DLR(), "steps": 6, "start_steps": 1, "restarts": 1, "seed": 1} | SOFT,
    ),
    (DiversifiedPGD(LINF, TargetedMargin(), steps=3, targets=1), {"targets": 2}),
    (
        FAB(WIDE, steps=3, restarts=3, targets=2),
        {"steps": 4, "restarts": 1, "targets": 1, "targeted": False, "alpha_max": 0.3, "eta": 1.3, "beta": 0.5}
        | {"until_broken": True, "seed": 1},
    ),
    (FMN(LINF, steps=10), {"steps": 11, "step_size": 0.3, "gamma": 0.3} | SOFT),
    (
        HopSkipJump(L2, queries=300, samples=20),
        {"queries": 200, "samples": 30, "starts": 1, "seed": 1},
    ),
    (
        SPSA(LINF, steps=3, samples=16),
        {"steps": 4, "samples": 32, "delta": 0.1, "step_size": 0.01, "loss": DLR(), "seed": 1},
    ),
    (
        Square(LINF, queries=30, restarts=2),
        {"queries": 40, "p": 0.3, "restarts": 1, "loss": DLR(), "rescale_schedule": True, "seed": 1},
    ),
]
# Of randomised models alone; and of the first loss beside an empty slot: tests/attacks/test_pgd.py.
ELSEWHERE = {"threat", "draws", "compat"}
NOISY = [attack for attack, changes in CASES if "seed" in changes]


def name(value: object) -> str:
    return type(value).__name__


@pytest.fixture(scope="module")
def images() -> tuple[nn.Module, Batch]:
    """A crooked network in training mode, so that it has a mode to be attacked in, and what it says of noise."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layers = [nn.Linear(64, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4)]
        model = nn.Sequential(nn.Flatten(), *layers)
        x = torch.rand(16, 1, 8, 8)
    with torch.no_grad():
        for layer in layers[::3]:
            layer.weight.mul_(4)  # type: ignore[operator, union-attr]
        y = model.eval()(x).argmax(dim=1)
    return model.train(), Batch(x, y)


@pytest.mark.parametrize(
    ("attack", "changes"),
    [(attack, {key: value}) for attack, changes in CASES for key, value in changes.items()],
    ids=lambda value: ", ".join(value) if isinstance(value, dict) else name(value),
)
def test_each_setting_moves_the_images(images: tuple[nn.Module, Batch], attack: Any, changes: dict[str, Any]) -> None:
    other = replace(attack, **(changes | {"keep": "last"} if "stop" in changes else changes))
    assert not torch.equal(attack(*images), other(*images))


def test_every_setting_is_among_them() -> None:
    changed: dict[type, set[str]] = {}
    for attack, changes in CASES:
        changed.setdefault(type(attack), set()).update(changes)
    for kind, names in changed.items():
        assert names == {field.name for field in fields(kind)} - ELSEWHERE, kind


@pytest.mark.parametrize("attack", NOISY, ids=name)
def test_a_new_step_draws_anew(images: tuple[nn.Module, Batch], attack: Any) -> None:
    model, batch = images
    assert torch.equal(attack(model, batch), attack(model, batch))
    assert not torch.equal(attack(model, batch), attack(model, replace(batch, step=1)))


def test_rounds_have_noise_of_their_own() -> None:
    rounds = rounds_of(5, 9, 10)
    assert len({each.stream for each in rounds}) == len(rounds) == 45
