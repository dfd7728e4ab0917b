"""Terms against hand-worked vectors and against plain loops in float64, gradients included."""

from __future__ import annotations

import math

import pytest
import torch

from unmoved.core.errors import UnmovedError
from unmoved.core.phases import Ramp
from unmoved.core.views import Views
from unmoved.terms import (
    CE,
    DLR,
    KL,
    MART,
    TRADES,
    BoostedCE,
    Margin,
    MisclassifiedKL,
    Sum,
    TargetedDLR,
    TargetedMargin,
)

# --- independent versions: one sample at a time, plain Python on scalars that carry a graph


def softmax(z):
    top = max(float(v.detach()) for v in z)
    e = [torch.exp(v - top) for v in z]
    total = sum(e)
    return [v / total for v in e]


def others(values, y):
    return [v for j, v in enumerate(values) if j != y]


def largest(values):
    return max(values, key=lambda v: float(v.detach()))


def ce(z, y, s=0.0):
    p = softmax(z)
    k = len(z)
    return sum(-((1 - s) * (j == y) + s / k) * torch.log(p[j]) for j in range(k))


def kl(zc, za):
    p, q = softmax(zc), softmax(za)
    return sum(a * (torch.log(a) - torch.log(b)) for a, b in zip(p, q, strict=True))


def boosted(za, y):
    p = softmax(za)
    return -torch.log(p[y]) - torch.log(1.0001 - largest(others(p, y)) + 1e-12)


def margin(z, y):
    return largest(others(z, y)) - z[y]


def dlr(z, y):
    ranked = sorted(z, key=lambda v: float(v.detach()), reverse=True)
    return -(z[y] - largest(others(z, y))) / (ranked[0] - ranked[2] + 1e-12)


CASES = [
    (CE("adv"), lambda c, a, y: ce(a, y)),
    (CE("clean"), lambda c, a, y: ce(c, y)),
    (CE("adv", 0.2), lambda c, a, y: ce(a, y, 0.2)),
    (KL(), lambda c, a, y: kl(c, a)),
    (Margin(), lambda c, a, y: margin(a, y)),
    (Margin("clean"), lambda c, a, y: margin(c, y)),
    (DLR(), lambda c, a, y: dlr(a, y)),
    (BoostedCE(), lambda c, a, y: boosted(a, y)),
    (MisclassifiedKL(), lambda c, a, y: kl(c, a) * (1.0000001 - softmax(c)[y])),
    (TRADES(6.0), lambda c, a, y: ce(c, y) + 6 * kl(c, a)),
    (MART(5.0), lambda c, a, y: boosted(a, y) + 5 * kl(c, a) * (1.0000001 - softmax(c)[y])),
]


@pytest.mark.parametrize(("term", "slow"), CASES, ids=[repr(c[0]) for c in CASES])
def test_agrees_with_plain_loops(term, slow):
    draw = torch.Generator().manual_seed(0)
    for classes in (3, 10):
        clean, adv = (2 * torch.randn(9, classes, generator=draw, dtype=torch.float64) for _ in range(2))
        y = torch.randint(classes, (9,), generator=draw)
        ours = [clean.clone().requires_grad_(), adv.clone().requires_grad_()]
        theirs = [clean.clone().requires_grad_(), adv.clone().requires_grad_()]
        fast = term(Views.of(y=y, clean=ours[0], adv=ours[1]))
        loops = torch.stack([slow(theirs[0][i], theirs[1][i], int(y[i])) for i in range(9)])
        assert torch.allclose(fast, loops, rtol=0, atol=1e-9)
        weights = torch.rand(9, generator=draw, dtype=torch.float64)
        a = torch.autograd.grad((weights * fast).sum(), ours, allow_unused=True, materialize_grads=True)
        b = torch.autograd.grad((weights * loops).sum(), theirs, allow_unused=True, materialize_grads=True)
        assert all(torch.allclose(g, h, rtol=0, atol=1e-9) for g, h in zip(a, b, strict=True))


def test_trades_is_the_batch_mean_of_a_sum_over_classes():
    """T18: 'mean' over all entries would be wrong by a factor of K; the gradient flows through both branches."""
    clean = torch.tensor([[math.log(0.5), math.log(0.25), math.log(0.25)]], requires_grad=True)
    adv = torch.tensor([[math.log(0.25), math.log(0.5), math.log(0.25)]], requires_grad=True)
    value = TRADES(1.0)(Views.of(y=torch.tensor([0]), clean=clean, adv=adv)).mean()
    assert value.item() == pytest.approx(math.log(2) + 0.25 * math.log(2), abs=1e-6)
    through_clean, through_adv = torch.autograd.grad(
        KL()(Views.of(y=torch.tensor([0]), clean=clean, adv=adv)).sum(), (clean, adv)
    )
    # d KL / d z' = p' - p, and d KL / d z = p * (log(p / p') - KL)
    assert torch.allclose(through_adv, torch.tensor([[-0.25, 0.25, 0.0]]), atol=1e-6)
    ratio, divergence = torch.tensor([[math.log(2), -math.log(2), 0.0]]), 0.25 * math.log(2)
    p = torch.tensor([[0.5, 0.25, 0.25]])
    assert torch.allclose(through_clean, p * (ratio - divergence), atol=1e-6)


def test_mart_constants():
    """T19: at saturation the boost is -log(1.0001 - 1 + 1e-12), not infinity, and one sample is a batch."""
    views = Views.of(y=torch.tensor([0]), adv=torch.tensor([[-50.0, 50.0]]), clean=torch.zeros(1, 2))
    assert BoostedCE()(views).item() == pytest.approx(100 - math.log(1e-4), abs=0.01)
    sure = Views.of(y=torch.tensor([0]), clean=torch.tensor([[90.0, 0.0]]), adv=torch.tensor([[0.0, 90.0]]))
    assert MisclassifiedKL()(sure).item() == pytest.approx(90 * 1e-7, rel=0.3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.isfinite(MART()(views)).all()


def test_dlr_is_invariant_to_shift_and_scale():
    """T28."""
    z = torch.randn(20, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    y = torch.arange(20) % 6
    base = DLR()(Views.of(y=y, adv=z))
    assert torch.allclose(DLR()(Views.of(y=y, adv=3.7 * z - 11)), base)
    assert ((base > 0) == (z.argmax(1) != y)).all()


@pytest.mark.parametrize("classes", [4, 10])
def test_targeted_losses_agree_with_plain_loops(classes):
    """T28: against a named class, and against the wrong class with the highest clean logit."""
    draw = torch.Generator().manual_seed(0)
    clean, adv = (2 * torch.randn(20, classes, generator=draw, dtype=torch.float64) for _ in range(2))
    y = torch.randint(classes, (20,), generator=draw)
    named = (y + 1) % classes
    for target in (None, named):
        lead, ratio = [], []
        for i in range(20):
            z, label = adv[i], int(y[i])
            wrong = [k for k in range(classes) if k != label]
            t = max(wrong, key=lambda k: float(clean[i, k])) if target is None else int(named[i])
            one, _, three, four = sorted(map(float, z), reverse=True)[:4]
            lead.append(float(z[t] - z[label]))
            ratio.append(-float(z[label] - z[t]) / (one - 0.5 * (three + four) + 1e-12))
        views = Views.of(y=y, clean=clean, adv=adv, target=target)
        assert TargetedMargin()(views).tolist() == pytest.approx(lead, abs=1e-12)
        assert TargetedDLR()(views).tolist() == pytest.approx(ratio, abs=1e-12)
        moved = Views.of(y=y, clean=clean, adv=3.7 * adv - 11, target=target)
        assert TargetedDLR()(moved).tolist() == pytest.approx(ratio, abs=1e-9)


def test_targeted_dlr_needs_four_classes():
    with pytest.raises(UnmovedError, match=r"at least 4 classes, came 3.*TargetedMargin"):
        TargetedDLR()(Views.of(y=torch.tensor([0]), clean=torch.zeros(1, 3), adv=torch.zeros(1, 3)))


def test_dlr_needs_three_classes():
    with pytest.raises(UnmovedError, match=r"at least 3 classes, came 2.*Margin"):
        DLR()(Views.of(y=torch.tensor([0]), adv=torch.zeros(1, 2)))


@pytest.mark.parametrize("make", [CE, Margin, DLR, BoostedCE])
def test_an_unknown_view_is_refused(make):
    with pytest.raises(UnmovedError, match="unknown value 'advv'; did you mean 'adv'"):
        make("advv")


def test_label_smoothing_has_bounds():
    with pytest.raises(UnmovedError, match="label_smoothing"):
        CE("adv", 1.5)


# --- sums


def views():
    draw = torch.Generator().manual_seed(3)
    return Views.of(
        y=torch.arange(6) % 4, clean=torch.randn(6, 4, generator=draw), adv=torch.randn(6, 4, generator=draw)
    )


def test_a_term_of_weight_zero_changes_no_bit_and_is_not_computed():
    class Explodes:
        def __call__(self, views):
            raise RuntimeError

    assert torch.equal(Sum((1.0, CE()), (0.0, Explodes()))(views()), CE()(views()))
    assert list(Sum((1.0, CE()), (0.0, Explodes())).parts(views())) == ["ce"]


def test_parts_are_unweighted_named_and_add_up():
    total = Sum((1.0, CE("clean")), (6.0, KL()), (0.5, CE("adv")))
    parts = total.parts(views())
    assert list(parts) == ["ce", "kl", "ce_2"]
    assert torch.equal(parts["kl"], KL()(views()))
    assert torch.allclose(total(views()), parts["ce"] + 6 * parts["kl"] + 0.5 * parts["ce_2"])


def test_sums_inside_sums():
    nested = Sum((1.0, TRADES(6.0)), (2.0, Margin()))
    assert list(nested.parts(views())) == ["ce", "kl", "margin"]
    scaled = Sum((0.5, TRADES(6.0)))
    assert torch.allclose(scaled(views()), 0.5 * TRADES(6.0)(views()))


def test_empty_and_all_zero_sums_are_refused():
    with pytest.raises(UnmovedError, match="at least one"):
        Sum()
    with pytest.raises(UnmovedError, match="every weight"):
        Sum((0.0, CE()))(views())
    with pytest.raises(UnmovedError, match="weight of CE"):
        Sum((float("nan"), CE()))


def test_a_weight_may_ramp():
    from unmoved.core.phases import resolve

    ramped = Sum((Ramp(0.0, 4.0), CE()), (1.0, KL()))
    assert resolve(ramped, 0.5) == Sum((2.0, CE()), (1.0, KL()))
    assert resolve(TRADES(), 0.5) == TRADES()
