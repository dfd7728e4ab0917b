"""HopSkipJump: near the optimum of linear models by decisions alone, within its budget."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from helpers.linear_models import deaf, distance, linear, nearest, nearest_in_the_box, on_faces
from torch import nn
from torch.nn import functional

from unmoved.attacks.hop_skip_jump import HopSkipJump
from unmoved.attacks.minimum_norm import searching
from unmoved.core.batch import Batch
from unmoved.core.errors import UnmovedError
from unmoved.core.threat import ThreatModel
from unmoved.testing import check_attack

BALLS = {"linf": ThreatModel("linf", 0.1), "l2": ThreatModel("l2", 0.6)}
NORMS = list(BALLS)


def wrong(model, batch, x):
    with torch.no_grad():
        return model(x).argmax(1) != batch.y


@pytest.mark.parametrize("norm", NORMS)
def test_sits_the_exam(norm):
    check_attack(lambda t: HopSkipJump(t, queries=1000, samples=50), norm=norm, minimum_norm=True, reach=0.25)


@pytest.mark.parametrize("norm", NORMS)
def test_on_a_linear_model_1000_decisions_come_near_the_optimum(norm):
    """Two classes, one boundary: at most 1.25 times the distance, never nearer; and more decisions come nearer."""
    model, batch = linear(2)
    best = nearest(model, batch, norm)
    means = []
    for queries in (250, 1000):
        x_adv = HopSkipJump(BALLS[norm], queries=queries, samples=50)(model, batch)
        assert wrong(model, batch, x_adv).all()
        ratio = distance(x_adv, batch, norm) / best
        assert (ratio >= 1 - 1e-9).all()
        means.append(float(ratio.mean()))
    assert ratio.max() < 1.25
    assert means[1] < means[0]


def test_the_estimated_normal():
    """Beside the boundary, where most decisions agree, their mean is taken off; each iteration draws anew."""
    model, batch = linear(2)
    w = model[1].weight[1] - model[1].weight[0]
    towards = -(2 * batch.y - 1)[:, None, None, None] * (w / w.norm()).reshape(1, 1, 4, 4)
    boundary = batch.x + towards * nearest(model, batch, "l2")[:, None, None, None]
    attack, radius = HopSkipJump(BALLS["l2"]), torch.full((len(batch),), 0.1, dtype=torch.float64)
    with searching(model, batch, BALLS["l2"]) as views, torch.no_grad():
        for share, cosine in ((0.0, 0.9), (0.4, 0.85)):
            normals = [attack._normal(views, boundary + share * 0.1 * towards, radius, 200, t) for t in (1, 2)]
            units = [normal / normal.flatten(1).norm(dim=1)[:, None, None, None] for normal in normals]
            assert (units[0] * towards).flatten(1).sum(1).mean() > cosine
            assert not torch.equal(*units)


def test_the_result_is_clear_of_rounding():
    """A little nearer to the clean image it would still be misclassified."""
    model, batch = linear(2, n=128)
    x_adv = HopSkipJump(BALLS["l2"], queries=300, samples=50)(model, batch)
    assert wrong(model, batch, x_adv - 5e-5 * (x_adv - batch.x)).all()


@pytest.mark.parametrize("norm", NORMS)
def test_on_the_faces_of_the_box_it_is_never_better_than_scipy(norm):
    model, batch = on_faces()
    x_adv = HopSkipJump(BALLS[norm], queries=1500, samples=50)(model, batch)
    assert wrong(model, batch, x_adv).all()
    assert x_adv.min() >= 0
    assert x_adv.max() <= 1
    ratio = distance(x_adv, batch, norm) / nearest_in_the_box(model, batch, norm)
    assert (ratio >= 1 - 1e-6).all()
    assert ratio.median() < 1.25


@pytest.mark.parametrize("norm", NORMS)
def test_decisions_are_all_it_sees(trained, norm):
    """A model that answers with nothing but its decision, and without a gradient, gives the same result.

    In float64, where no proposal lies within rounding of a tie: of logits that is no decision, of one-hot answers one.
    """
    model, batch = trained
    model, batch = copy.deepcopy(model).double(), batch.take(torch.arange(8))
    batch = replace(batch, x=batch.x.double())

    class Decides(nn.Module):
        def forward(self, x):
            with torch.no_grad():
                return functional.one_hot(model(x).argmax(1), 4).to(x)

    attack = HopSkipJump(BALLS[norm], queries=400, samples=30)
    x_adv = attack(model, batch)
    assert torch.equal(attack(Decides(), batch), x_adv)
    alone = torch.cat([wrong(model, batch.take(i), x_adv[i]) for i in torch.arange(8).split(1)])
    assert alone.all()  # T16


@pytest.mark.parametrize("queries", [1, 5, 40, 300, 777])
def test_never_asks_more_than_its_budget_of_any_sample(trained, queries):
    model, batch = trained
    asked = 0

    def count(module, inputs, out):
        nonlocal asked
        asked += len(inputs[0])

    handle = model.register_forward_hook(count)
    for k in (0, 40, 90):
        asked = 0
        HopSkipJump(BALLS["l2"], queries=queries, samples=20)(model, batch.take(torch.tensor([k])))
        assert asked <= queries
        assert asked > 0.6 * queries or queries < 50
    handle.remove()


def test_the_result_does_not_depend_on_how_many_images_share_a_pass(monkeypatch):
    model, batch = linear(3, n=5)
    attack = HopSkipJump(BALLS["l2"], queries=300, samples=20)
    whole = attack(model, batch)
    for images in (1, 70):
        monkeypatch.setattr("unmoved.attacks.hop_skip_jump.PASS", images)
        assert torch.allclose(attack(model, batch), whole, atol=1e-9)


def test_starts_belong_to_the_sample_and_the_seed():
    model, batch = linear(3, n=4)
    attack = HopSkipJump(BALLS["l2"], queries=200, samples=20)
    assert not torch.equal(
        attack(model, batch), HopSkipJump(BALLS["l2"], queries=200, samples=20, seed=1)(model, batch)
    )
    wide = Batch(torch.rand(2, 3, 9, 7), torch.zeros(2, dtype=torch.long))
    blends = [attack._blend(wide, attempt) for attempt in range(12)]
    others = [HopSkipJump(BALLS["l2"], seed=1)._blend(wide, attempt) for attempt in range(12)]
    assert not any(torch.equal(*pair) for pair in zip(blends, others, strict=True))
    assert all(blend.shape == wide.x.shape and blend.min() >= 0 and blend.max() <= 1 for blend in blends)
    assert len(blends[3].flatten(1)[0].unique()) == 3 * 2  # blocks of 8 x 8
    assert set(blends[4].unique().tolist()) == {0.0, 1.0}
    flat = Batch(torch.rand(2, 16), torch.zeros(2, dtype=torch.long))
    assert attack._blend(flat, 3).shape == (2, 16)


def test_lost_and_hopeless_samples_come_back_as_they_are():
    model, batch = linear(2)
    y = batch.y.clone()
    y[::3] = 1 - y[::3]
    x_adv = HopSkipJump(BALLS["l2"], queries=100, samples=20)(model, Batch(batch.x, y))
    assert torch.equal((x_adv == batch.x).flatten(1).all(1), y != batch.y)
    hopeless = Batch(batch.x, torch.zeros_like(y))
    assert torch.equal(HopSkipJump(BALLS["linf"])(deaf(), hopeless), batch.x)
    assert len(HopSkipJump(BALLS["linf"])(deaf(), hopeless.take(torch.arange(0)))) == 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"queries": 0}, "HopSkipJump.queries: expected a whole number >= 1, came 0"),
        ({"samples": 0}, "HopSkipJump.samples"),
        ({"starts": 0}, "HopSkipJump.starts"),
        ({"threat": ThreatModel("l1", 1.0)}, "HopSkipJump: expected norm linf or l2, came l1"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(UnmovedError, match=message):
        HopSkipJump(**({"threat": BALLS["l2"]} | settings))
