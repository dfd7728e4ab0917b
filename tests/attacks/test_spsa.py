"""SPSA against a linear model, and against models that have no gradient to give."""

from __future__ import annotations

import pytest
import torch
from helpers.linear_models import deaf, linear
from torch import nn

from unmoved.attacks import PGD
from unmoved.attacks.gradients import attacking
from unmoved.attacks.spsa import SPSA
from unmoved.core.batch import Batch
from unmoved.core.errors import UnmovedError
from unmoved.core.threat import ThreatModel
from unmoved.terms.margin import margin
from unmoved.testing import check_attack

LINF, L2, L1 = ThreatModel("linf", 0.1), ThreatModel("l2", 0.6), ThreatModel("l1", 2.0)


def wrong(model, batch, x):
    with torch.no_grad():
        return model(x).argmax(1) != batch.y


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_sits_the_exam(norm):
    check_attack(lambda t: SPSA(t, steps=4, samples=24), norm=norm, maximises=False)  # it stops at success


def test_on_a_linear_model_it_reaches_the_analytic_optimum():
    """margin - eps ||w||_dual, to 5 % of the reach, for samples that no point of the ball breaks."""
    model, batch = linear(2)
    weight = model[1].weight[1] - model[1].weight[0]
    direction = weight.sign().reshape(1, 1, 4, 4)
    batch = Batch(0.5 + 0.3 * direction * (2 * batch.y - 1)[:, None, None, None], batch.y, batch.index)
    before = margin(model(batch.x), batch.y)
    for threat, dual in ((LINF, weight.abs().sum()), (L2, weight.norm())):
        reach = threat.eps * dual
        assert (before + reach < 0).all()
        short = (before + reach - margin(model(SPSA(threat)(model, batch)), batch.y)) / reach
        assert (short >= -1e-9).all()
        assert short.max() < 0.05


def test_the_estimate_is_the_gradient_on_average():
    """On a linear model its error is that of n random signs: ||g|| sqrt((d - 1) / n)."""
    model, batch = linear(2, n=8)
    weight = (model[1].weight[1] - model[1].weight[0]).reshape(1, 1, 4, 4)
    truth = -weight * (2 * batch.y - 1)[:, None, None, None]
    for samples in (100, 1600):
        with attacking(model, batch, LINF) as views, torch.no_grad():
            estimate = SPSA(LINF, samples=samples)._estimate(views, views.x, step=3)
        error = (estimate - truth).flatten(1).norm(dim=1).square().mean().sqrt() / weight.norm()
        assert float(error) == pytest.approx((15 / samples) ** 0.5, rel=0.3)


def test_the_estimate_does_not_depend_on_how_many_images_share_a_pass(monkeypatch):
    model, batch = linear(3, n=5)
    attack = SPSA(LINF, steps=3, samples=37)
    whole = attack(model, batch)
    for images in (1, 100):
        monkeypatch.setattr("unmoved.attacks.spsa.PASS", images)
        assert torch.allclose(attack(model, batch), whole, atol=1e-12)


@pytest.mark.parametrize("threat", [LINF, L2], ids=str)
def test_breaks_models_without_gradients(trained, threat):
    model, batch = trained
    batch = batch.take(torch.arange(48))
    threat = ThreatModel(threat.norm, 2 * threat.eps)

    class Rounded(nn.Module):
        def forward(self, x):
            return model((x * 64).round() / 64)

    class Cut(nn.Module):
        def forward(self, x):
            with torch.no_grad():
                return model(x)

    pgd = wrong(model, batch, PGD(threat, steps=20, keep="best")(model, batch)).float().mean()
    assert pgd > 0.9
    blind = wrong(Rounded(), batch, PGD(threat, steps=20, start="none", keep="best")(Rounded(), batch))
    assert blind.float().mean() < 0.1
    for each in (Rounded(), Cut()):
        x_adv = SPSA(threat, samples=64)(each, batch)
        threat.check(x_adv, batch.x)
        assert wrong(each, batch, x_adv).float().mean() > pgd - 0.1


def test_a_success_ends_the_queries_and_stands(trained):
    model, batch = trained
    sizes = []
    handle = model.register_forward_hook(lambda module, inputs, out: sizes.append(len(inputs[0])))
    attack = SPSA(ThreatModel("linf", 0.2), steps=10, samples=32)
    few = batch.take(torch.arange(32))
    x_adv = attack(model, few)
    handle.remove()
    assert wrong(model, few, x_adv).float().mean() > 0.9
    assert sum(sizes) < 0.7 * 32 * (10 * 2 * 32 + 11)
    first = wrong(model, batch, batch.x)
    lost = batch.take(torch.nonzero(first).flatten()) if first.any() else Batch(batch.x[:2], (batch.y[:2] + 1) % 4)
    assert torch.equal(SPSA(LINF)(model, lost), lost.x)


def test_deaf_models_and_empty_batches():
    _, batch = linear(2, n=3)
    hopeless = Batch(batch.x, torch.zeros_like(batch.y))
    assert torch.equal(SPSA(LINF, steps=2, samples=4)(deaf(), hopeless), batch.x)
    assert len(SPSA(LINF)(deaf(), hopeless.take(torch.arange(0)))) == 0


def test_in_bf16_a_success_is_one_in_float32(trained):
    model, batch = trained
    batch = batch.take(torch.arange(32))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        x_adv = SPSA(ThreatModel("linf", 0.2), steps=8, samples=32)(model, batch)
    assert x_adv.dtype == torch.float32
    assert wrong(model, batch, x_adv).float().mean() > 0.8


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 0}, "SPSA.steps: expected a whole number >= 1, came 0"),
        ({"samples": 0}, "SPSA.samples"),
        ({"delta": 0.0}, "SPSA.delta"),
        ({"step_size": -1.0}, "SPSA.step_size"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(UnmovedError, match=message):
        SPSA(LINF, **settings)
