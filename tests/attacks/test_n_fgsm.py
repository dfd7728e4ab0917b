"""N-FGSM against loops of its own, what it becomes without noise, and who refuses it: it leaves the ball by design."""

from __future__ import annotations

import pytest
import torch
from helpers.cli import RECIPE, recipe
from torch import nn

from unmoved import attacks, evaluate, train
from unmoved.attacks import FGSM, NFGSM
from unmoved.core import noise
from unmoved.core.errors import UnmovedError
from unmoved.core.protocols import Method
from unmoved.core.threat import ThreatModel
from unmoved.data import digits
from unmoved.interop import to_foolbox
from unmoved.runs.assembly import Assembly
from unmoved.runs.recipe import read
from unmoved.terms import CE
from unmoved.training.validation import Validation

THREAT = ThreatModel("linf", 0.06)
REFUSAL = "expected an attack that stays in the ball, came NFGSM, which leaves it by design"


def test_it_is_the_papers_algorithm(trained):
    """Algorithm 1 of the paper, pixel by pixel."""
    model, batch = trained
    few = batch.take(torch.arange(5))
    draws = noise.uniform(few.index, (1, 8, 8), seed=3, step=few.step)
    for k, alpha in ((2.0, None), (0.5, 0.02)):
        want = few.x.clone()
        for i in range(5):
            start = torch.empty(1, 1, 8, 8)
            for pixel in range(64):
                eta = k * 0.06 * (2 * draws[i].flatten()[pixel] - 1)
                start.view(-1)[pixel] = min(max(few.x[i].flatten()[pixel] + eta, 0.0), 1.0)
            start.requires_grad_()
            nn.functional.cross_entropy(model(start), few.y[i : i + 1]).backward()
            step = (0.06 if alpha is None else alpha) * start.grad.sign()
            want[i] = (start.detach() + step).clamp(0, 1)[0]
        assert torch.allclose(NFGSM(THREAT, k=k, step_size=alpha, seed=3)(model, few), want, atol=1e-6)


def test_it_leaves_the_ball_by_at_most_the_noise(trained):
    model, batch = trained
    for k in (1.0, 2.0, 4.0):
        away = THREAT.distance(NFGSM(THREAT, k=k)(model, batch), batch.x)
        assert (away > THREAT.radius).all()
        assert (away <= (k + 1) * THREAT.radius + 1e-6).all()


def test_without_noise_it_is_the_fast_gradient_sign_method(trained):
    model, batch = trained
    assert torch.equal(NFGSM(THREAT, k=0.0)(model, batch), FGSM(THREAT)(model, batch))


def test_only_training_takes_it(tmp_path):
    data = digits(test=0.9)
    split, model = data.train.take(40), nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    method = Method(NFGSM(THREAT), CE())
    train(model, method, split, epochs=1)
    calls = [
        lambda: evaluate(model, split, {"a": NFGSM(THREAT)}, THREAT),
        lambda: evaluate(model, split, {"a": attacks.Transfer(THREAT, model, NFGSM(THREAT))}, THREAT),
        lambda: Validation.of(split, NFGSM(THREAT), THREAT),
        lambda: to_foolbox(NFGSM(THREAT)),
    ]
    for call in calls:
        with pytest.raises(UnmovedError, match=REFUSAL.replace("NFGSM", "(NFGSM|Transfer)")):
            call()
    tables = {
        "validation": ["validation={use='nfgsm'}"],
        "evaluation.attacks.it": ["evaluation.attacks.it={use='nfgsm'}"],
    }
    for key, change in tables.items():
        with pytest.raises(UnmovedError, match=f"{key}: {REFUSAL}"):
            Assembly(read(recipe(tmp_path, RECIPE, "judged"), change))
    made = Assembly(read(recipe(tmp_path, RECIPE, "trained"), ['attack={use="nfgsm", k=1.5}']))
    assert made.phases.phases[0][1].attack == NFGSM(made.threat, k=1.5, seed=made.recipe.training.seed)
    with pytest.raises(UnmovedError, match=REFUSAL):
        made.attack("nfgsm") and evaluate(model, split, {"a": made.attack("nfgsm")}, made.threat)


@pytest.mark.parametrize("settings", [{"k": -1.0}, {"step_size": -0.1}, {"mode": "x"}, {"seed": -1.5}])
def test_bad_settings(settings):
    with pytest.raises(UnmovedError, match="NFGSM"):
        NFGSM(THREAT, **settings)
