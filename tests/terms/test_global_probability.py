"""ProbsCut's global term: the notes' vectors, plain loops in float64, and what its learned q must do."""

from __future__ import annotations

import json
import math

import pytest
import torch
from torch import nn

from unmoved import Method, train_step
from unmoved.attacks import FGSM
from unmoved.core.batch import Batch
from unmoved.core.errors import UnmovedError
from unmoved.core.threat import ThreatModel
from unmoved.core.views import Views
from unmoved.terms import CE, KL, GlobalProbability, Sum


def with_probability(p: float, classes: int = 2) -> torch.Tensor:
    """Logits (1, K) whose softmax gives class 0 the probability p."""
    rest = math.log((1 - p) / (classes - 1))
    return torch.tensor([[math.log(p)] + [rest] * (classes - 1)], dtype=torch.float64)


def term(q: float, **settings) -> GlobalProbability:
    return GlobalProbability(settings.pop("num_classes", 2), init=q, **settings).double()


@pytest.mark.parametrize(
    ("divergence", "at_08", "at_04"),
    [
        ("qp", -0.172609, 0.243279),
        ("pq", 0.230146, -0.162186),
        ("generalized", 0.027391, 0.043279),
        ("bernoulli", 0.104650, 0.081093),
    ],
)
def test_vectors_of_the_notes(divergence, at_08, at_04):
    """probscut.md 1.5: q = 0.6 against P = 0.8 and P = 0.4."""
    g = term(0.6, divergence=divergence)
    for p, expected in ((0.8, at_08), (0.4, at_04)):
        value = g(Views.of(y=torch.tensor([0]), adv=with_probability(p)))
        assert value.item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("divergence", ["generalized", "bernoulli"])
def test_zero_with_zero_slope_exactly_where_p_equals_q(divergence):
    z = with_probability(0.6).requires_grad_()
    value = term(0.6, divergence=divergence)(Views.of(y=torch.tensor([0]), adv=z))
    assert value.item() == pytest.approx(0, abs=1e-7)
    (slope,) = torch.autograd.grad(value.sum(), z)
    assert slope.abs().max() < 1e-7
    for p in (0.3, 0.59, 0.61, 0.9):
        assert term(0.6, divergence=divergence)(Views.of(y=torch.tensor([0]), adv=with_probability(p))).item() > 0


def loops(g, y, clean, adv):
    """One sample and one class at a time."""
    values = []
    for i in range(len(y)):
        label = int(y[i])
        p = {}
        for name, z in (("clean", clean[i]), ("adv", adv[i])):
            e = [torch.exp(v) for v in z]
            p[name] = e[label] / sum(e)
        s = (p["clean"] + p["adv"]) / 2 if g.view == "both" else p[g.view]
        q = 1 / (1 + torch.exp(-g.theta[label]))
        values.append(
            {
                "generalized": lambda q, s: q * (torch.log(q) - torch.log(s)) - q + s,
                "bernoulli": lambda q, s: q * torch.log(q / s) + (1 - q) * torch.log((1 - q) / (1 - s)),
                "qp": lambda q, s: q * torch.log(q / s),
                "pq": lambda q, s: s * torch.log(s / q),
            }[g.divergence](q, s)
        )
    return torch.stack(values)


@pytest.mark.parametrize("view", ["adv", "clean", "both"])
@pytest.mark.parametrize("divergence", ["generalized", "bernoulli", "qp", "pq"])
def test_agrees_with_plain_loops_gradients_of_q_included(divergence, view):
    draw = torch.Generator().manual_seed(0)
    clean, adv = (torch.randn(13, 4, generator=draw, dtype=torch.float64).requires_grad_() for _ in range(2))
    y = torch.randint(4, (13,), generator=draw)
    g = term(0.4, num_classes=4, divergence=divergence, view=view)
    with torch.no_grad():
        g.theta.copy_(torch.randn(4, generator=draw))
    leaves = [clean, adv, g.theta]
    fast, slow = g(Views.of(y=y, clean=clean, adv=adv)), loops(g, y, clean, adv)
    assert torch.allclose(fast, slow, rtol=0, atol=1e-9)
    grads = [torch.autograd.grad(v.sum(), leaves, materialize_grads=True, allow_unused=True) for v in (fast, slow)]
    assert all(torch.allclose(a, b, rtol=0, atol=1e-9) for a, b in zip(*grads, strict=True))


def settle(g, p, lr=0.5):
    """Where q goes for one class whose samples keep the probabilities p."""
    z = torch.cat([with_probability(v) for v in p])
    views = Views.of(y=torch.zeros(len(p), dtype=torch.long), adv=z)
    optimizer = torch.optim.SGD(g.parameters(), lr=lr) if list(g.parameters()) else None
    for _ in range(400):
        if optimizer is not None:
            optimizer.zero_grad()
            g(views).mean().backward()
            optimizer.step()
        g.update(views)
    return g.q[0].item()


def test_where_q_settles():
    """probscut.md 1.3: the geometric mean, the logit mean, and the mean for ema alone."""
    p = [0.2, 0.5, 0.9]
    geometric = math.exp(sum(map(math.log, p)) / 3)
    logit = sum(math.log(v / (1 - v)) for v in p) / 3
    assert settle(term(0.5), p) == pytest.approx(geometric, abs=1e-4)
    assert settle(term(0.5, divergence="bernoulli"), p) == pytest.approx(1 / (1 + math.exp(-logit)), abs=1e-4)
    assert settle(term(0.5, update="ema", momentum=0.9), p) == pytest.approx(sum(p) / 3, abs=1e-4)
    sure = [0.9995, 0.9999]  # the mean itself, beyond the bounds that a learned theta has
    assert settle(term(0.5, update="ema", momentum=0.9), sure) == pytest.approx(0.9997, abs=1e-6)
    # The literal forms do not close the gap: qp settles at the geometric mean over e, pq runs to its bound.
    assert settle(term(0.5, divergence="qp"), p) == pytest.approx(geometric / math.e, abs=1e-3)
    assert settle(term(0.5, divergence="pq"), p, lr=10) == pytest.approx(1 / (1 + math.exp(-6)), abs=1e-3)


def test_ema_moves_only_the_classes_present_and_theta_stays_bounded():
    g = GlobalProbability(3, update="ema", init=0.5, momentum=0.9)
    g.update(Views.of(y=torch.tensor([0, 0]), adv=torch.tensor([[9.0, 0, 0], [9.0, 0, 0]])))
    assert g.q[0] == pytest.approx(0.9 * 0.5 + 0.1 * 0.99975, abs=1e-4)
    assert g.q[1:].tolist() == [0.5, 0.5]
    assert not list(g.parameters())
    bounded = GlobalProbability(2)
    with torch.no_grad():
        bounded.theta.copy_(torch.tensor([40.0, -40.0]))
    bounded.update(Views.of(y=torch.tensor([0]), adv=torch.zeros(1, 2)))
    assert bounded.theta.tolist() == [6.0, -6.0]


def test_reports_mean_and_variance_of_each_class():
    g = GlobalProbability(2)
    g.update(Views.of(y=torch.tensor([0]), clean=with_probability(0.9), adv=with_probability(0.5)))
    g.update(Views.of(y=torch.tensor([0]), clean=with_probability(0.7), adv=with_probability(0.1)))
    facts = g.report()
    assert facts["q"] == [0.5, 0.5]
    assert facts["p_clean_mean"][0] == pytest.approx(0.8)
    assert facts["p_clean_variance"][0] == pytest.approx(0.01)
    assert facts["p_adv_mean"][0] == pytest.approx(0.3)
    assert facts["p_adv_variance"][0] == pytest.approx(0.04)
    assert "p_clean_mean" not in g.report()


def test_views_that_nobody_computed_cost_no_pass():
    calls = []

    class Counting(nn.Module):
        def forward(self, x):
            calls.append(1)
            return x.flatten(1)[:, :3]

    views = Views(Counting(), Batch(torch.rand(4, 1, 2, 2), torch.tensor([0, 1, 2, 0])), torch.rand(4, 1, 2, 2))
    g = GlobalProbability(3)
    g(views)
    g.update(views)
    assert len(calls) == 1


@pytest.mark.parametrize("view", ["adv", "clean", "both"])
def test_at_weight_zero_no_bit_of_the_step_changes(view):
    """A moving average that asked for a view of its own would move BatchNorm's statistics."""
    ends = []
    for beside in ((), ((0.0, GlobalProbability(3, update="ema", view=view)),)):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(4), nn.Linear(4, 3))
        batch = Batch(torch.rand(6, 1, 2, 2), torch.arange(6) % 3)
        method = Method(FGSM(ThreatModel("linf", 0.1)), Sum((1.0, CE("adv")), *beside))
        train_step(model, method, torch.optim.SGD(model.parameters(), lr=0.1), batch, "float32")
        ends.append(model.state_dict())
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def test_weight_zero_is_the_base_loss_bit_for_bit():
    draw = torch.Generator().manual_seed(0)
    views = Views.of(
        y=torch.tensor([0, 1]), clean=torch.randn(2, 3, generator=draw), adv=torch.randn(2, 3, generator=draw)
    )
    base = Sum((1.0, CE("clean")), (6.0, KL()))
    assert torch.equal(Sum((1.0, base), (0.0, GlobalProbability(3)))(views), base(views))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_classes": 1}, "num_classes: expected a whole number >= 2, came 1"),
        ({"divergence": "kl"}, "divergence"),
        ({"update": "grad"}, "did you mean 'gradient'"),
        ({"view": "advv"}, "did you mean 'adv'"),
        ({"init": 0.0}, "init: expected a finite number >= 0.0024"),
        ({"init": 0.002}, "init: expected a finite number >= 0.0024"),
        ({"init": 0.998}, "init: expected a finite number >= 0.0024.* and <= 0.9975"),
        ({"momentum": 1.5}, "momentum"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(UnmovedError, match=message):
        GlobalProbability(**{"num_classes": 3, **settings})


def test_another_number_of_classes_is_refused():
    with pytest.raises(UnmovedError, match="expected num_classes = 4, as the model has, came 3"):
        GlobalProbability(3)(Views.of(y=torch.tensor([0]), adv=torch.zeros(1, 4)))


def test_a_class_that_did_not_occur_has_no_mean_and_the_report_is_json() -> None:
    term = GlobalProbability(3)
    logits = torch.randn(3, 3, generator=torch.Generator().manual_seed(0))
    term.update(Views.of(y=torch.tensor([0, 0, 1]), clean=logits, adv=-logits))
    facts = json.loads(json.dumps(term.report(), allow_nan=False))
    for view, z in (("clean", logits), ("adv", -logits)):
        p = z.softmax(1)
        assert facts[f"p_{view}_mean"] == [pytest.approx(float(p[:2, 0].mean())), pytest.approx(float(p[2, 1])), None]
        assert facts[f"p_{view}_variance"][2] is None
        assert facts[f"p_{view}_variance"][0] == pytest.approx(float(p[:2, 0].var(correction=0)))
