"""DRSL, PRSL and their neighbours: the notes' vectors and plain loops in float64, gradients included."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from unmoved.core.errors import UnmovedError
from unmoved.core.views import Views
from unmoved.terms import CE, DRSL, PRSL, ComplementEntropy, GuidedComplementEntropy, LogitSqueeze, Sum

ROW = torch.tensor([[5.0, 3.0, 2.0, 1.0]], dtype=torch.float64)
PAIR = torch.tensor([[5.0, 3.0, 2.0, 1.0], [0.0, 4.0, 1.0, 1.0]], dtype=torch.float64)


def one(term):
    return term(Views.of(y=torch.tensor([0]), clean=ROW)).sum().item()


def two(term):
    return term(Views.of(y=torch.tensor([0, 1]), clean=PAIR)).sum().item()


def test_vectors_of_the_notes():
    """drsl.md 2.2, 2.3, 3.1, 3.2. The authors sum over the batch, so sums are compared here."""
    assert one(CE("clean")) == pytest.approx(0.1851825, abs=1e-7)
    assert one(DRSL()) == pytest.approx(2.0, abs=1e-12)
    assert one(Sum((1.0, CE("clean")), (0.005, DRSL()))) == pytest.approx(0.1951825, abs=1e-7)
    assert one(DRSL(mean_divisor="K")) == pytest.approx(2.75, abs=1e-12)
    assert one(Sum((1.0, CE("clean")), (0.001, DRSL(mean_divisor="K")))) == pytest.approx(0.1879325, abs=1e-7)
    assert two(DRSL()) == pytest.approx(2.6666667, abs=1e-7)
    assert two(PRSL(start=0, end=2)) == pytest.approx(1.9028266, abs=1e-7)
    mean_ce = two(CE("clean")) / 2
    assert mean_ce + 0.001 * two(PRSL(start=0, end=2)) == pytest.approx(0.1502154, abs=1e-7)
    assert one(ComplementEntropy()) == pytest.approx(-0.2080989, abs=1e-7)
    assert one(GuidedComplementEntropy(1 / 3)) == pytest.approx(-0.5645032, abs=1e-7)
    rescaled = one(GuidedComplementEntropy(1 / 3)) * math.log(4) / math.log(3)
    assert rescaled == pytest.approx(-0.7123238, abs=1e-7)
    assert one(LogitSqueeze()) == pytest.approx(math.sqrt(39), abs=1e-12)


def wrong(z, y):
    return [z[j] for j in range(len(z)) if j != y]


def drsl(rows, y, divisor):
    out = []
    for z, label in zip(rows, y.tolist(), strict=True):
        others = wrong(z, label)
        m = sum(others) / (len(others) if divisor == "K-1" else len(z))
        out.append(sum((v - m) ** 2 for v in others))
    return torch.stack(out)


def prsl(rows, y, start, end):
    t = []
    for z, label in zip(rows, y.tolist(), strict=True):
        ranked = sorted(wrong(z, label), key=lambda v: -float(v.detach()))[start:end]
        t.append(sum(ranked) / len(ranked))
    total = torch.log(sum(torch.exp(v) for v in t))
    return torch.stack([total - v for v in t])


def entropy(z, label):
    e = [torch.exp(v) for v in wrong(z, label)]
    return sum((v / sum(e)) * torch.log(v / sum(e)) for v in e)


CASES = [
    (DRSL(), lambda z, y: drsl(z, y, "K-1")),
    (DRSL(mean_divisor="K"), lambda z, y: drsl(z, y, "K")),
    (PRSL(), lambda z, y: prsl(z, y, 0, 4)),
    (PRSL(start=1, end=3), lambda z, y: prsl(z, y, 1, 3)),
    (LogitSqueeze(), lambda z, y: torch.stack([torch.sqrt(sum(v**2 for v in row)) for row in z])),
    (ComplementEntropy(), lambda z, y: torch.stack([entropy(r, int(k)) / len(r) for r, k in zip(z, y, strict=True)])),
    (
        GuidedComplementEntropy(0.4),
        lambda z, y: torch.stack(
            [F.softmax(r, 0)[k] ** 0.4 * entropy(r, int(k)) / math.log(len(r)) for r, k in zip(z, y, strict=True)]
        ),
    ),
]


@pytest.mark.parametrize(("term", "slow"), CASES, ids=[repr(c[0]) for c in CASES])
def test_agrees_with_plain_loops(term, slow):
    draw = torch.Generator().manual_seed(0)
    for classes in (5, 10):
        z = (2 * torch.randn(9, classes, generator=draw, dtype=torch.float64)).requires_grad_()
        y = torch.randint(classes, (9,), generator=draw)
        weights = torch.rand(9, generator=draw, dtype=torch.float64)
        fast, loops = term(Views.of(y=y, clean=z)), slow(z, y)
        assert torch.allclose(fast, loops, rtol=0, atol=1e-9)
        a, b = (torch.autograd.grad((weights * v).sum(), z)[0] for v in (fast, loops))
        assert torch.allclose(a, b, rtol=0, atol=1e-9)


def test_drsl_lives_in_log_probabilities_and_ignores_shifts():
    """drsl.md 2.2: (K-1) Var of log p over the wrong classes; the other divisor is not shift-invariant."""
    draw = torch.Generator().manual_seed(1)
    z, y = torch.randn(7, 6, generator=draw, dtype=torch.float64), torch.arange(7) % 6
    views = Views.of(y=y, clean=z)
    log_p = F.log_softmax(z, dim=1)
    expected = torch.stack(
        [torch.cat([row[:k], row[k + 1 :]]).var(correction=0) * 5 for row, k in zip(log_p, y, strict=True)]
    )
    assert torch.allclose(DRSL()(views), expected)
    shifted = Views.of(y=y, clean=z + 7)
    assert torch.allclose(DRSL()(shifted), DRSL()(views))
    extra = DRSL(mean_divisor="K")(views) - DRSL()(views)
    means = torch.stack([torch.cat([row[:k], row[k + 1 :]]).mean() for row, k in zip(z, y, strict=True)])
    assert torch.allclose(extra, 5 * (means / 6) ** 2)
    assert not torch.allclose(DRSL(mean_divisor="K")(shifted), DRSL(mean_divisor="K")(views))


def test_the_gradient_of_drsl_leaves_the_true_logit_alone():
    z = ROW.clone().requires_grad_()
    (g,) = torch.autograd.grad(DRSL()(Views.of(y=torch.tensor([0]), clean=z)).sum(), z)
    assert torch.allclose(g, torch.tensor([[0.0, 2.0, 0.0, -2.0]], dtype=torch.float64))


def test_prsl_is_smallest_where_the_batch_agrees():
    same = ROW.repeat(3, 1)
    value = PRSL(end=2)(Views.of(y=torch.zeros(3, dtype=torch.long), clean=same)).sum().item()
    assert value == pytest.approx(3 * math.log(3))


@pytest.mark.parametrize("term", [DRSL(), PRSL(end=1), ComplementEntropy(), GuidedComplementEntropy()], ids=repr)
def test_two_classes_have_no_wrong_distribution(term):
    with pytest.raises(UnmovedError, match="at least 3 classes, came 2"):
        term(Views.of(y=torch.tensor([0]), clean=torch.zeros(1, 2)))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DRSL(view="both"), r"DRSL.view: unknown value 'both'"),
        (lambda: DRSL(mean_divisor="k"), r"DRSL.mean_divisor"),
        (lambda: PRSL(start=-1), r"PRSL.start"),
        (lambda: PRSL(start=2, end=2), r"PRSL.end: expected a whole number >= 3, came 2"),
        (lambda: GuidedComplementEntropy(-1), r"alpha"),
        (lambda: PRSL(end=4)(Views.of(y=torch.tensor([0]), clean=ROW)), r"at most 3 wrong classes, came 4"),
    ],
)
def test_bad_settings(make, message):
    with pytest.raises(UnmovedError, match=message):
        make()
