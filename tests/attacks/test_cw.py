"""The attack of Carlini and Wagner against closed forms, scipy, and the mistakes of its ports (T15)."""

from __future__ import annotations

import pytest
import torch
from helpers.linear_models import deaf, distance, linear, nearest, nearest_in_the_box, on_faces
from torch import nn

from unmoved.attacks.cw import CW
from unmoved.attacks.fmn import FMN
from unmoved.core.batch import Batch
from unmoved.core.errors import UnmovedError
from unmoved.core.threat import ThreatModel
from unmoved.terms.margin import margin
from unmoved.testing import check_attack

BALL = ThreatModel("l2", 0.6)


def wrong(model, batch, x):
    with torch.no_grad():
        return model(x).argmax(1) != batch.y


def test_sits_the_exam():
    check_attack(
        lambda t: CW(t, steps=60, search_steps=5, lr=0.008, initial_const=0.003),
        norm="l2",
        minimum_norm=True,
        reach=0.05,
    )


@pytest.mark.parametrize("num_classes", [2, 6])
def test_on_a_linear_model_the_nearest_point_is_known(num_classes):
    """At a learning rate below the distances, so that Adam's first steps do not carry the image far beyond."""
    model, batch = linear(num_classes, n=16)
    best = nearest(model, batch, "l2")
    x_adv = CW(BALL, steps=150, lr=0.002, search_steps=7, initial_const=3e-4)(model, batch)
    assert wrong(model, batch, x_adv).all()
    ratio = distance(x_adv, batch, "l2") / best
    assert (ratio >= 1 - 1e-9).all()
    assert (ratio <= 1.05).double().mean() >= (1.0 if num_classes == 2 else 0.8)
    assert ratio.max() < 1.4


def test_pixels_on_the_faces_of_the_box_move_as_scipy_moves_them():
    model, batch = on_faces()
    best = nearest_in_the_box(model, batch, "l2")
    x_adv = CW(BALL, steps=500, search_steps=6, initial_const=0.003)(model, batch)
    assert wrong(model, batch, x_adv).all()
    ratio = distance(x_adv, batch, "l2") / best
    assert (ratio >= 1 - 1e-6).all()
    assert (ratio <= 1.05).all()
    at_face = (batch.x == 0) | (batch.x == 1)
    assert ((x_adv - batch.x).abs()[at_face] > 0.01).double().mean() > 0.2


def test_the_best_wrong_logit_is_right_where_all_are_negative():
    """A constant added to all logits changes nothing."""
    model, batch = linear(3, n=8)

    class Lowered(nn.Module):
        def forward(self, x):
            return model(x) - 64

    attack = CW(BALL, steps=60, search_steps=5, initial_const=0.003)
    plain, lowered = attack(model, batch), attack(Lowered(), batch)
    assert wrong(model, batch, lowered).all()
    assert torch.allclose(plain, lowered, atol=1e-6)


def test_every_sample_has_its_own_search():
    """Easy and hard samples together, and the same one by one; a constant of their own and an end of their own."""
    model, batch = linear(2, n=6)
    scale = torch.tensor([1.0, 8.0, 1.0, 0.2, 4.0, 1.0], dtype=torch.float64)
    batch = Batch((0.5 + scale[:, None, None, None] * (batch.x - 0.5)).clamp(0, 1), batch.y)
    attack = CW(BALL, steps=60, search_steps=5)
    whole = attack(model, batch)
    alone = torch.cat([attack(model, batch.take(i)) for i in torch.arange(6).split(1)])
    assert torch.allclose(whole, alone, atol=1e-9)
    sizes = []
    handle = model.register_forward_hook(lambda module, inputs, out: sizes.append(len(inputs[0])))
    attack(model, batch)
    handle.remove()
    assert len(set(sizes)) > 3  # samples leave one by one


def test_confidence_is_a_margin():
    model, batch = linear(3, n=8)
    for kappa in (0.0, 3.0):
        x_adv = CW(BALL, steps=150, confidence=kappa, initial_const=0.003)(model, batch)
        lead = margin(model(x_adv), batch.y)
        assert (lead >= kappa).all()
        assert (lead < kappa + 0.2).all()


def test_on_a_network_it_is_near_fmn(trained):
    model, batch = trained
    batch = batch.take(torch.arange(12))
    x_adv = CW(BALL, steps=150, search_steps=6, initial_const=0.01)(model, batch)
    assert wrong(model, batch, x_adv).all()
    fmn = distance(FMN(BALL)(model, batch), batch, "l2")
    ratio = distance(x_adv, batch, "l2") / fmn
    assert ratio.median() < 1.03
    assert ratio.max() < 1.2


def test_lost_and_hopeless_samples_come_back_as_they_are():
    model, batch = linear(2)
    y = batch.y.clone()
    y[::3] = 1 - y[::3]
    x_adv = CW(BALL, steps=30, search_steps=6, initial_const=0.003)(model, Batch(batch.x, y))
    assert torch.equal((x_adv == batch.x).flatten(1).all(1), y != batch.y)
    assert torch.equal(CW(BALL, steps=12, search_steps=3)(deaf(), Batch(batch.x, torch.zeros_like(y))), batch.x)
    assert len(CW(BALL)(model, batch.take(torch.arange(0)))) == 0


@pytest.mark.parametrize("norm", ["linf", "l1"])
def test_knows_l2_alone(norm):
    with pytest.raises(UnmovedError, match=f"CW: expected norm l2, came {norm}; use FMN"):
        CW(ThreatModel(norm, 0.5))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 0}, "CW.steps: expected a whole number >= 1, came 0"),
        ({"search_steps": 0}, "CW.search_steps"),
        ({"confidence": -1.0}, "CW.confidence"),
        ({"lr": 0.0}, "CW.lr"),
        ({"initial_const": 0.0}, "CW.initial_const"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(UnmovedError, match=message):
        CW(BALL, **settings)
