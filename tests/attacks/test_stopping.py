"""The sensible adversary against its algorithm in a plain loop, and the noise of the friendly one."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from unmoved.attacks import PGD, Friendly, Sensible
from unmoved.core.batch import Batch
from unmoved.core.threat import ThreatModel
from unmoved.terms import CE, KL

THREAT, STEPS, SIZE = ThreatModel("linf", 0.1), 6, 0.03


def by_the_algorithm(model, x0, y, start, c, divergence, adaptive):
    """One sample, as the authors' loop has it (Kim and Wang 2022).

    Returns:
        The image, and when the sample stopped: 0 at the start, k where step k was taken back, None never.
    """
    with torch.no_grad():
        log_p = model(x0[None]).log_softmax(1)

    def ce(z):
        return F.cross_entropy(z, y[None])

    def kl(z):
        return (log_p.exp() * (log_p - z.log_softmax(1))).sum()

    x = start.clone().requires_grad_(True)
    z = model(x[None])
    value = ce(z)  # the start and the first step go by cross-entropy, whatever comes then
    if z.argmax() != y or value > -math.log(c):
        return start, 0
    for step in range(1, STEPS + 1):
        (slope,) = torch.autograd.grad(value, x)
        trial = x.detach() + SIZE * slope.sign()
        trial = torch.minimum(torch.maximum(trial, x0 - THREAT.eps), x0 + THREAT.eps).clamp(0, 1)
        trial.requires_grad_(True)
        value = (kl if divergence else ce)(model(trial[None]))
        if adaptive and value > -math.log(c):
            return x.detach(), step
        x = trial
    return x.detach(), None


@pytest.mark.parametrize(("divergence", "adaptive"), [(False, True), (False, False), (True, True), (True, False)])
def test_sensible_is_the_authors_loop(trained, divergence, adaptive):
    model, batch = trained
    batch = Batch(batch.x[:48].double(), batch.y[:48])
    model = nn.Sequential(*model).double()
    try:
        start = PGD(THREAT, steps=0)(model, batch)
        with torch.no_grad():  # so that some stay at the start
            c = float(model(start).softmax(1).gather(1, batch.y[:, None]).quantile(0.2))
        loss = KL() if divergence else CE()
        attack = PGD(THREAT, loss, steps=STEPS, step_size=SIZE, stop=Sensible(c, adaptive))
        ours = attack(model, batch)
        ends = [
            by_the_algorithm(model, *sample, c, divergence, adaptive)
            for sample in zip(batch.x, batch.y, start, strict=True)
        ]
    finally:
        model.float()
        model.zero_grad(set_to_none=True)
    assert torch.allclose(ours, torch.stack([x for x, _ in ends]), atol=1e-9)
    stopped = {stop for _, stop in ends}
    assert 0 in stopped
    assert len(stopped) > 3 if adaptive else stopped == {0, None}  # the premise: at the start, later, or never


def test_the_noise_of_the_friendly_adversary_has_its_size_and_is_new_at_each_step():
    """On a model without a slope the noise alone moves the image: k steps of it have a variance of k omega^2."""
    flat = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
    nn.init.zeros_(flat[1].weight)
    nn.init.zeros_(flat[1].bias)
    batch = Batch(torch.full((64, 1, 8, 8), 0.5), torch.zeros(64, dtype=torch.long))  # right: nothing stops
    for steps in (1, 4):
        attack = PGD(ThreatModel("linf", 0.3), steps=steps, start="none", stop=Friendly(0, omega=0.01))
        moved = attack(flat, batch) - batch.x
        assert moved.std() == pytest.approx(0.01 * math.sqrt(steps), rel=0.05)
        assert moved.mean().abs() < 0.001


def test_sensible_leaves_what_is_misclassified_at_the_start_where_it_is_whatever_its_confidence():
    """With c below 1/2 a wrong sample may have p_y above c: the start is judged by the prediction, too."""
    draw = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 4))
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(0.1 * torch.randn(p.shape, generator=draw))
    batch, c = Batch(torch.rand(80, 1, 8, 8, generator=draw), torch.arange(80) % 4), 0.15
    start, x_adv = PGD(THREAT, steps=0)(model, batch), PGD(THREAT, steps=3, stop=Sensible(c))(model, batch)
    p = model(start).softmax(1)
    sure = p.gather(1, batch.y[:, None]).squeeze(1) > c + 1e-3
    wrong, still = p.argmax(1) != batch.y, (x_adv == start).flatten(1).all(1)
    assert (sure & wrong).sum() > 5
    assert still[wrong].all()
    assert (~still)[sure & ~wrong].any()
