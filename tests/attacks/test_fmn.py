"""FMN against closed forms, scipy and PGD; and what holds for every minimum-norm attack."""

from __future__ import annotations

import pytest
import torch
from helpers.linear_models import deaf, distance, linear, nearest, nearest_in_the_box, on_faces
from torch import nn

from unmoved.attacks import PGD
from unmoved.attacks.fmn import FMN, annealed
from unmoved.attacks.minimum_norm import Nearest, crossed, searching
from unmoved.core.batch import Batch
from unmoved.core.errors import UnmovedError
from unmoved.core.protocols import MinimumNormAttack
from unmoved.core.threat import ThreatModel
from unmoved.testing import check_attack

NORMS = ["linf", "l2", "l1"]
BALLS = {"linf": ThreatModel("linf", 0.1), "l2": ThreatModel("l2", 0.6), "l1": ThreatModel("l1", 2.0)}


def wrong(model, batch, x):
    with torch.no_grad():
        return model(x).argmax(1) != batch.y


@pytest.mark.parametrize("norm", NORMS)
def test_sits_the_exam(norm):
    check_attack(lambda t: FMN(t, steps=30), norm=norm, minimum_norm=True, reach=0.01)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("num_classes", [2, 6])
def test_on_a_linear_model_the_nearest_point_is_known(norm, num_classes):
    """Never nearer than the boundary, at most 5 % farther where it went to the nearest one; with 2 classes there is
    no other."""
    model, batch = linear(num_classes)
    best = nearest(model, batch, norm)
    assert best.max() < 0.4
    x_adv = FMN(BALLS[norm])(model, batch)
    assert wrong(model, batch, x_adv).all()
    ratio = distance(x_adv, batch, norm) / best
    assert (ratio >= 1 - 1e-9).all()
    assert (ratio <= 1.05).double().mean() >= (1.0 if num_classes == 2 else 0.8)
    assert ratio.max() < 1.4


@pytest.mark.parametrize("norm", NORMS)
def test_on_the_faces_of_the_box_it_is_scipys_optimum(norm):
    model, batch = on_faces()
    best, unbound = nearest_in_the_box(model, batch, norm), nearest(model, batch, norm)
    assert (best > 1.05 * unbound).double().mean() > 0.3  # the box binds
    x_adv = FMN(BALLS[norm])(model, batch)
    assert wrong(model, batch, x_adv).all()
    assert x_adv.min() >= 0
    assert x_adv.max() <= 1
    ratio = distance(x_adv, batch, norm) / best
    assert (ratio >= 1 - 1e-6).all()
    assert (ratio <= 1.05).all()


@pytest.mark.parametrize("norm", NORMS)
def test_what_pgd_breaks_fmn_finds_nearby(trained, norm):
    model, batch = trained
    away = distance(FMN(BALLS[norm])(model, batch), batch, norm)
    right = ~wrong(model, batch, batch.x)
    for share in (0.3, 0.7):
        eps = float(away[right].quantile(share))
        broken = wrong(model, batch, PGD(ThreatModel(norm, eps), steps=40, keep="best")(model, batch)) & right
        assert broken.sum() > 20
        # The rest have a nearer boundary to a class that is not the best wrong one.
        assert (away[broken] <= 1.02 * eps).float().mean() > 0.85
        assert away[broken].max() < 1.4 * eps


@pytest.mark.parametrize("norm", NORMS)
def test_a_success_is_one_in_any_batch_size_and_precision(trained, norm):
    """T16: float32, one by one, and found under bf16."""
    model, batch = trained
    x_adv = FMN(BALLS[norm], steps=30)(model, batch)
    alone = torch.cat([wrong(model, batch.take(i), x_adv[i]) for i in torch.arange(len(batch)).split(1)])
    assert alone.all()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(FMN(BALLS[norm], steps=30)(model, batch), x_adv)


def test_eps_does_not_matter():
    model, batch = linear(3)
    results = [FMN(ThreatModel("l2", eps), steps=10)(model, batch) for eps in (0.0, 0.01, 3.0)]
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])
    assert isinstance(FMN(BALLS["l2"]), MinimumNormAttack)


def test_lost_and_hopeless_samples_come_back_as_they_are():
    model, batch = linear(2)
    y = batch.y.clone()
    y[::3] = 1 - y[::3]
    x_adv = FMN(BALLS["l2"], steps=10)(model, Batch(batch.x, y))
    same = (x_adv == batch.x).flatten(1).all(1)
    assert torch.equal(same, y != batch.y)
    hopeless = Batch(batch.x, torch.zeros_like(y))
    for norm in NORMS:
        assert torch.equal(FMN(BALLS[norm], steps=5)(deaf(), hopeless), batch.x)
        empty = hopeless.take(torch.arange(0))
        assert len(FMN(BALLS[norm])(deaf(), empty)) == 0


def test_only_right_samples_are_computed_once_a_step(trained):
    model, batch = trained
    y = batch.y.clone()
    y[:100] = (y[:100] + 1) % 4
    sizes = []
    handle = model.register_forward_hook(lambda module, inputs, out: sizes.append(len(inputs[0])))
    x_adv = FMN(BALLS["linf"], steps=7)(model, Batch(batch.x, y))
    handle.remove()
    right = int((~wrong(model, Batch(batch.x, y), batch.x)).sum())
    found = int((x_adv != batch.x).flatten(1).any(1).sum())
    assert sizes == [256] + [right] * 8 + [found]  # at the end the proposals are judged a little further out


@pytest.mark.parametrize("norm", NORMS)
def test_comes_back_from_a_first_point_that_is_far(norm):
    """Saturated logits: the slope at the clean image promises a boundary many times as far as it is."""
    model, batch = linear(2)

    class Saturated(nn.Module):
        def forward(self, x):
            z = model(x)
            return torch.tanh(15 * (z - z.mean(dim=1, keepdim=True)))

    best = nearest(model, batch, norm)
    x_adv = FMN(BALLS[norm], steps=30)(Saturated(), batch)
    assert wrong(model, batch, x_adv).all()
    assert (distance(x_adv, batch, norm) / best).max() < 1.05


def test_the_nearest_point_is_kept():
    model, batch = linear(2, n=3)
    with searching(model, Batch(batch.x, torch.tensor([1, 0, 1])), BALLS["l2"]) as views:
        lost = views.clean.argmax(1) != views.y
        assert lost.any()
        assert torch.equal(Nearest(views, BALLS["l2"]).distance == 0, lost)
    with searching(model, batch, BALLS["l2"]) as views:
        kept = Nearest(views, BALLS["l2"])
        far, near = batch.x + 0.1, batch.x + 0.05
        yes = torch.ones(3, dtype=torch.bool)
        kept.offer(torch.arange(3), far, yes, batch.x)
        kept.offer(torch.tensor([2, 0]), near[[2, 0]], torch.tensor([True, False]), batch.x[[2, 0]])
        kept.offer(torch.arange(3), batch.x + 0.2, yes, batch.x)
    assert torch.equal(kept.x, torch.stack([far[0], far[1], near[2]]))
    assert kept.distance.tolist() == pytest.approx([0.4, 0.4, 0.2])


def test_crossed_asks_for_more_than_rounding():
    z = torch.tensor([[5.0, 5.0], [5.0, 5.000001], [5.0, 5.001], [-5.0, -4.0], [5.0, 4.0]])
    assert crossed(z, torch.zeros(5, dtype=torch.long)).tolist() == [False, False, True, True, False]


def test_annealing():
    assert [annealed(1.0, 0.1, share) for share in (0, 0.5, 1)] == pytest.approx([1.0, 0.55, 0.1])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 0}, "FMN.steps: expected a whole number >= 1, came 0"),
        ({"step_size": 0.0}, "FMN.step_size"),
        ({"gamma": 1.5}, "FMN.gamma"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(UnmovedError, match=message):
        FMN(BALLS["l2"], **settings)
