"""Every attack is called with a batch, or with images and labels, to the same bits."""

from __future__ import annotations

import inspect

import pytest
import torch
from torch import nn

from unmoved import Batch, ThreatModel, UnmovedError, attacks

THREAT = ThreatModel("linf", 0.1)
NAMES = [name for name in attacks.__all__ if "model" in inspect.signature(getattr(attacks, name).__call__).parameters]


def model() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Flatten(), nn.Linear(12, 3))


def test_all_attacks_are_here() -> None:
    assert {"PGD", "APGD", "AutoAttack", "Quick", "Square", "FAB", "FMN", "CW", "DeepFool", "SPSA", "Transfer"} <= {
        *NAMES
    }


@pytest.mark.parametrize("name", NAMES)
def test_images_and_labels_are_a_batch(name: str) -> None:
    make, net = getattr(attacks, name), model()
    threat = ThreatModel("l2", 0.5) if name == "CW" else THREAT
    attack = make(threat, source=model()) if name == "Transfer" else make(threat)
    x = torch.rand(2, 3, 2, 2, generator=torch.Generator().manual_seed(1))
    y = net(x).argmax(1)
    assert torch.equal(attack(net, x, y), attack(net, Batch(x, y)))
    for wrong in ((Batch(x, y), y), (x,), (x.mul(255).byte(), y)):
        with pytest.raises(UnmovedError, match=r"expected (no labels|a model|float images)"):
            attack(net, *wrong)
