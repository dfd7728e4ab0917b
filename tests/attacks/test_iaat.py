"""Instance-adaptive training: the radius of each sample by hand, and its memory."""

from __future__ import annotations

import pytest
import torch

from unmoved.attacks import IAAT
from unmoved.core.batch import Batch
from unmoved.core.errors import UnmovedError
from unmoved.core.protocols import StatefulAttack
from unmoved.core.threat import ThreatModel

THREAT = ThreatModel("linf", 0.3)


def right(model, batch, x):
    return model(x).argmax(1) == batch.y


def test_radii_follow_the_rule(trained):
    model, batch = trained
    batch = Batch(batch.x, batch.y.clone())
    batch.y[:20] = (batch.y[:20] + 1) % 4  # wrong as they are
    attack = IAAT(THREAT, gamma=0.05, momentum=0.75)
    assert isinstance(attack, StatefulAttack)
    old = torch.full((len(batch),), 0.3)
    for _ in range(4):
        assert torch.equal(attack.radius(batch.index), old)
        x_adv = attack(model, batch)
        assert (THREAT.distance(x_adv, batch.x) <= old + 1e-6).all()
        tried = (old + 0.05).clamp_max(0.3)
        further = attack._attack(model, batch, tried)
        new = torch.where(right(model, batch, further), tried, torch.where(right(model, batch, x_adv), old, old - 0.05))
        new = (new * right(model, batch, batch.x)).clamp_min(0)
        attack.update(model, batch, x_adv)
        old = 0.75 * old + 0.25 * new
    assert old[20:].min() < 0.28
    wrong = ~right(model, batch, batch.x)
    assert wrong.sum() >= 20
    assert torch.allclose(attack.radius(batch.index)[wrong], torch.tensor(0.3 * 0.75**4))


def test_a_step_is_twice_the_radius_over_their_number_and_no_shorter_than_the_least(trained, monkeypatch):
    model, batch = trained
    batch, sizes, ascend = batch.take(torch.arange(3)), [], ThreatModel.ascend

    def noted(self, x_adv, gradient, length, *rest):
        sizes.append(length.flatten())
        return ascend(self, x_adv, gradient, length, *rest)

    monkeypatch.setattr(ThreatModel, "ascend", noted)
    attack = IAAT(THREAT, steps=4, step_size=0.02)
    attack._memory.write(batch.index, torch.tensor([0.2, 0.04, 0.01]))
    attack(model, batch)
    assert torch.allclose(torch.stack(sizes), torch.tensor([0.1, 0.02, 0.02]).expand(4, 3))


def test_calling_does_not_write(trained):
    model, batch = trained
    attack = IAAT(THREAT)
    attack(model, batch)
    assert torch.equal(attack.radius(batch.index), torch.full((len(batch),), 0.3))


def test_memory_belongs_to_the_sample_and_survives(trained):
    model, batch = trained
    whole, halves = IAAT(THREAT), IAAT(THREAT)
    whole.update(model, batch, whole(model, batch))
    for part in (torch.arange(128, 256), torch.arange(128)):  # in another order
        some = batch.take(part)
        halves.update(model, some, halves(model, some))
    assert torch.allclose(whole.radius(batch.index), halves.radius(batch.index), atol=1e-6)
    fresh = IAAT(THREAT)
    fresh.load_state_dict(whole.state_dict())
    assert torch.equal(fresh(model, batch), whole(model, batch))
    unseen = Batch(batch.x[:2], batch.y[:2], index=torch.tensor([5000, 3]))
    assert fresh.radius(unseen.index)[0] == pytest.approx(0.3)
    assert fresh.radius(unseen.index)[1] == whole.radius(torch.tensor([3]))[0]


def test_identities_are_any_numbers_and_the_memory_is_as_large_as_the_samples_seen(trained):
    model, batch = trained
    names = torch.cat([torch.tensor([2**63 - 1, -(2**63), 10**11, -7, 0]), torch.arange(5, len(batch)) * 10**15])
    plain, named = IAAT(THREAT), IAAT(THREAT)
    # Noise is keyed by identity, so that the radii are told here instead of being found.
    radii = torch.linspace(0.01, 0.29, len(batch))
    for attack, index in ((plain, batch.index), (named, names)):
        for part in (torch.arange(100, len(batch)), torch.arange(120)):  # some of them twice
            attack._memory.write(index[part], radii[part])
    assert torch.equal(named.radius(names), radii)
    assert torch.equal(plain.radius(batch.index), radii)
    order = torch.randperm(len(batch))
    assert torch.equal(named.radius(names[order]), radii[order])
    assert torch.equal(named.radius(torch.tensor([1, -1, 2**63 - 2])), torch.full((3,), 0.3))
    assert sum(tensor.numel() for tensor in named.state_dict().values()) == 2 * len(batch)
    fresh = IAAT(THREAT)
    fresh.load_state_dict(named.state_dict())
    assert torch.equal(fresh.radius(names), radii)
    renamed = Batch(batch.x, batch.y, names)
    named.update(model, renamed, named(model, renamed))
    assert not torch.equal(named.radius(names), radii)
    assert len(named.state_dict()["index"]) == len(batch)


@pytest.mark.parametrize(
    "settings", [{"steps": 0}, {"gamma": -1.0}, {"momentum": 2.0}, {"mode": "x"}, {"step_size": -1}]
)
def test_bad_settings(settings):
    with pytest.raises(UnmovedError, match="IAAT"):
        IAAT(THREAT, **settings)
