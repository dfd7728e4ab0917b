"""Low precision proposes, float32 decides."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from unmoved.attacks import APGD, AutoAttack
from unmoved.attacks.gradients import Best, attacking, broken
from unmoved.core.batch import Batch
from unmoved.core.threat import ThreatModel
from unmoved.terms import TargetedMargin


class Rounds(nn.Module):
    """Two logits that differ by 0.001: in bf16 near 100 they are equal, and the first class is taken."""

    def forward(self, x):
        base = 100 + 0 * x.flatten(1).sum(1, keepdim=True)
        return torch.cat([base, base + 1e-3], dim=1).to(torch.get_autocast_dtype("cpu") if on() else x.dtype)


def on():
    return torch.is_autocast_enabled("cpu")


def test_a_success_in_bf16_alone_is_none():
    model, x, y = Rounds(), torch.full((3, 1, 2, 2), 0.5), torch.ones(3, dtype=torch.long)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(x).float()
        assert (logits.argmax(1) != y).all(), "in bf16 it looks broken"
        assert not broken(model, x, logits, y).any()
        assert not broken(model, x, None, y).any()
    assert not broken(model, x, model(x), y).any()


def test_a_climb_in_bf16_ends_with_successes_of_float32_alone():
    model, y = Rounds(), torch.ones(3, dtype=torch.long)
    batch, attack = Batch(torch.full((3, 1, 2, 2), 0.5), y), APGD(ThreatModel("linf", 0.1), steps=3)
    with torch.autocast("cpu", dtype=torch.bfloat16), attacking(model, batch, attack.threat) as views:
        assert not attack._climb(views, batch.x, None).wrong.any()


@pytest.mark.parametrize("until_broken", [False, True])
def test_under_autocast_apgd_proposes_only_what_float32_confirms(until_broken):
    """The search may be in bf16; each sample that it calls broken is broken in float32."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(36, 20), nn.ReLU(), nn.Linear(20, 5))
    x = torch.rand(40, 1, 6, 6, generator=torch.Generator().manual_seed(1))
    batch, threat = Batch(x, model(x).argmax(1)), ThreatModel("linf", 0.02)
    exact = APGD(threat, steps=20, until_broken=until_broken)(model, batch)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = APGD(threat, steps=20, until_broken=until_broken)(model, batch)
    wrong = [(model(found).argmax(1) != batch.y).sum() for found in (exact, low)]
    assert wrong[0] > 5
    assert abs(int(wrong[0]) - int(wrong[1])) <= 1


def test_the_best_is_misclassified_first_and_then_of_highest_loss():
    best, x = Best(), torch.zeros(3, 1, 1, 1)
    best.offer(x, torch.tensor([1.0, 5.0, 2.0]), torch.tensor([False, False, True]))
    best.offer(x + 1, torch.tensor([0.5, 1.0, 9.0]), torch.tensor([True, False, False]))
    assert best.x.flatten().tolist() == [1.0, 0.0, 0.0]
    best.offer(x[:1] + 2, torch.tensor([9.0]), torch.tensor([True]), torch.tensor([2]))
    assert best.x.flatten().tolist() == [1.0, 0.0, 2.0]


def test_earlier_targets_win_however_many_share_a_pass(monkeypatch):
    """Stacking several targets in one pass changes no result."""
    from unmoved.attacks import rounds

    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(36, 20), nn.ReLU(), nn.Linear(20, 5)).double()
    x = torch.rand(12, 1, 6, 6, generator=torch.Generator().manual_seed(1)).double()
    batch = Batch(x, model(x).argmax(1))
    attack = APGD(ThreatModel("linf", 0.05), TargetedMargin(), steps=10, targets=4, until_broken=True)
    found = []
    for rows in (1, 24, 10_000):
        monkeypatch.setattr(rounds, "ROWS", rows)
        found.append(attack(model, batch))
    assert torch.allclose(found[0], found[1])
    assert torch.allclose(found[0], found[2])
    assert (model(found[0]).argmax(1) != batch.y).any()


def test_an_ensemble_under_autocast_counts_float32_successes_alone():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 4))
    x = torch.rand(6, 1, 4, 4, generator=torch.Generator().manual_seed(1))
    batch = Batch(x, model(x).argmax(1))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        x_adv = AutoAttack(ThreatModel("linf", 0.3))(model, batch)
    changed = (x_adv != x).flatten(1).any(1)
    assert changed.any()
    assert (model(x_adv)[changed].argmax(1) != batch.y[changed]).all()
