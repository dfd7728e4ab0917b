"""Transfer: another model's weakness, proposed as it is."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from unmoved.attacks import PGD
from unmoved.attacks.fmn import FMN
from unmoved.attacks.transfer import Transfer
from unmoved.core.errors import UnmovedError
from unmoved.core.protocols import MinimumNormAttack
from unmoved.core.threat import ThreatModel
from unmoved.testing import check_attack
from unmoved.testing.fixtures import network, same_random_state, untouched

LINF = ThreatModel("linf", 0.1)


class Wide(nn.Module):
    """A source that takes images of any float type."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner.double()

    def forward(self, x):
        return self.inner(x.double()).to(x.dtype)


class Silent(nn.Module):
    def forward(self, x):
        raise AssertionError("the attacked model was asked")


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_sits_the_exam(norm):
    source = Wide(network().eval())
    check_attack(lambda t: Transfer(t, source, PGD(t, steps=3)), norm=norm, maximises=False)


def test_is_the_attack_on_the_source_and_asks_the_model_nothing(trained):
    model, batch = trained
    attack = PGD(LINF, steps=5)
    assert torch.equal(Transfer(LINF, source=model, attack=attack)(Silent(), batch), attack(model, batch))
    default = Transfer(LINF, model)(Silent(), batch)
    assert torch.equal(default, PGD(LINF, steps=50, keep="best")(model, batch))


def test_the_source_is_left_as_found(trained):
    model, batch = trained
    source = copy.deepcopy(model).train()
    source[1].eval()
    source[0].weight.grad = torch.ones_like(source[0].weight)
    for attack in (None, PGD(LINF, mode="train"), FMN(LINF, steps=3)):
        with untouched(source), same_random_state():
            Transfer(LINF, source, attack)(model, batch.take(torch.arange(4)))


def test_the_ball_is_its_own(trained):
    """So that a curve over eps, which replaces the threat model, changes the attack that is run."""
    model, batch = trained
    small = ThreatModel("linf", 0.02)
    x_adv = Transfer(small, model, PGD(LINF, steps=5))(Silent(), batch)
    assert torch.equal(x_adv, PGD(small, steps=5)(model, batch))

    def foreign(source, some):
        return (some.x + 0.01).clamp(0, 1)

    assert torch.equal(Transfer(small, model, foreign)(Silent(), batch), (batch.x + 0.01).clamp(0, 1))


def test_may_leave_the_ball_where_its_attack_may(trained):
    model, batch = trained
    nearest, fixed = Transfer(LINF, model, FMN(LINF)), Transfer(LINF, model)
    assert isinstance(nearest, MinimumNormAttack)
    assert nearest.minimum_norm
    assert not fixed.minimum_norm
    assert torch.equal(nearest(Silent(), batch), FMN(LINF)(model, batch))


def test_repr_tells_sources_apart_by_their_weights(trained):
    model, _ = trained
    same, other = copy.deepcopy(model), copy.deepcopy(model)
    with torch.no_grad():
        other[4].bias[0] += 1e-3
    named = [repr(Transfer(LINF, source)) for source in (model, same, other, copy.deepcopy(model).bfloat16())]
    assert named[0] == named[1]
    assert len(set(named)) == 3
    assert "source=<Sequential " in named[0]


def test_another_device_is_refused(trained):
    _, batch = trained
    source = nn.Sequential(nn.Flatten(), nn.Linear(64, 4, device="meta"))
    with pytest.raises(UnmovedError, match=r"on cpu, where the images are, came one on meta; .*source.to\(\"cpu\"\)"):
        Transfer(LINF, source)(Silent(), batch)


def test_the_source_is_a_module():
    with pytest.raises(UnmovedError, match=r"Transfer.source: expected an nn.Module, came str"):
        Transfer(LINF, source="runs/other")
