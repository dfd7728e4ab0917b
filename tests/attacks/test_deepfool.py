"""DeepFool against closed forms and the textbook loop."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers.linear_models import deaf, distance, linear, nearest, nearest_in_the_box, on_faces
from torch import nn

from unmoved.attacks.deepfool import DeepFool
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
    check_attack(DeepFool, norm=norm, minimum_norm=True, reach=0.0201)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("num_classes", [2, 6])
def test_on_a_linear_model_it_stops_the_overshoot_beyond_the_nearest_boundary(norm, num_classes):
    model, batch = linear(num_classes)
    best = nearest(model, batch, norm)
    for overshoot in (0.02, 0.5):
        x_adv = DeepFool(BALLS[norm], overshoot=overshoot)(model, batch)
        assert wrong(model, batch, x_adv).all()
        assert torch.allclose(distance(x_adv, batch, norm) / best, torch.tensor(1 + overshoot).double(), rtol=1e-6)
    blinkered = DeepFool(BALLS[norm], candidates=1)(model, batch)
    assert (distance(blinkered, batch, norm) > 1.03 * best).any() == (num_classes > 2)


@pytest.mark.parametrize("norm", NORMS)
def test_on_the_faces_of_the_box_it_gets_through_and_never_beats_scipy(norm):
    model, batch = on_faces()
    x_adv = DeepFool(BALLS[norm])(model, batch)
    assert wrong(model, batch, x_adv).all()
    assert x_adv.min() >= 0
    assert x_adv.max() <= 1
    ratio = distance(x_adv, batch, norm) / nearest_in_the_box(model, batch, norm)
    assert (ratio >= 1 - 1e-6).all()
    assert ratio.median() < 1.05


def by_hand(model, x, y, norm, steps, overshoot):
    """Algorithm 2 for one sample, where the box does not bind."""
    total, x1 = torch.zeros_like(x), x
    order = [k for k in model(x[None])[0].argsort(descending=True).tolist() if k != y]
    for _ in range(steps):
        leaf = x1.clone().requires_grad_(True)
        z = model(leaf[None])[0]
        if z.argmax() != y:
            break
        ways = []
        for k in order:
            (w,) = torch.autograd.grad(z[k] - z[y], leaf, retain_graph=True)
            f = float((z[k] - z[y]).detach().abs())
            ways.append((f / float(w.norm() if norm == "l2" else w.abs().sum()), w))
        away, w = min(ways, key=lambda way: way[0])
        total = total + away * (w / w.norm() if norm == "l2" else w.sign())
        x1 = x + (1 + overshoot) * total
    return x1


@pytest.mark.parametrize("norm", NORMS)
def test_is_the_papers_loop(trained, norm):
    model, batch = trained
    model, free = copy.deepcopy(model).double(), ThreatModel(norm, 1.0, bounds=(-9.0, 9.0))
    batch = Batch(batch.x[:16].double(), batch.y[:16])
    ours = DeepFool(free, steps=20, overshoot=0.01)(model, batch)
    for i in range(16):
        hand = by_hand(model, batch.x[i], int(batch.y[i]), norm, 20, 0.01)
        assert torch.allclose(ours[i], hand, atol=1e-9)
    assert (ours != batch.x).flatten(1).any(1).sum() > 12


def test_samples_that_are_through_are_not_computed_again(trained):
    model, batch = trained
    sizes = []
    handle = model.register_forward_hook(lambda module, inputs, out: sizes.append(len(inputs[0])))
    x_adv = DeepFool(BALLS["l2"])(model, batch)
    handle.remove()
    *walk, judged = sizes  # at the end the proposals are judged a little further out
    assert walk == sorted(walk, reverse=True)
    assert walk[-1] < 0.5 * len(batch)
    assert judged <= len(batch)
    assert wrong(model, batch, x_adv).all()
    alone = torch.cat([wrong(model, batch.take(i), x_adv[i]) for i in torch.arange(len(batch)).split(1)])
    assert alone.all()  # T16


def test_lost_and_hopeless_samples_come_back_as_they_are():
    model, batch = linear(2)
    y = batch.y.clone()
    y[::3] = 1 - y[::3]
    x_adv = DeepFool(BALLS["l2"])(model, Batch(batch.x, y))
    assert torch.equal((x_adv == batch.x).flatten(1).all(1), y != batch.y)
    x_adv = DeepFool(BALLS["linf"], steps=3)(deaf(), Batch(batch.x, torch.zeros_like(y)))
    assert torch.equal(x_adv, batch.x)  # T11: zero gradients, no NaN
    assert len(DeepFool(BALLS["l2"])(model, batch.take(torch.arange(0)))) == 0


def test_refuses_what_it_cannot():
    model, batch = linear(2)

    class Cut(nn.Module):
        def forward(self, x):
            return model(x.detach())

    with pytest.raises(UnmovedError, match="differentiable in the image"):
        DeepFool(BALLS["l2"])(Cut(), batch)
    with pytest.raises(UnmovedError, match=r"DeepFool: expected norm linf or l2, came l1.*use FMN"):
        DeepFool(ThreatModel("l1", 1.0))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 0}, "DeepFool.steps: expected a whole number >= 1, came 0"),
        ({"overshoot": -0.1}, "DeepFool.overshoot"),
        ({"candidates": 0}, "DeepFool.candidates"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(UnmovedError, match=message):
        DeepFool(BALLS["l2"], **settings)
