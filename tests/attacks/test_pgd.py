"""PGD against oracles and against the field's known mistakes (the T-numbers)."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from unmoved.attacks import APGD, FGSM, PGD, Friendly, Sensible
from unmoved.attacks.apgd_steps import MomentumSteps
from unmoved.attacks.gradients import attacking, gradient_at
from unmoved.attacks.rounds import Round
from unmoved.core.batch import Batch
from unmoved.core.errors import UnmovedError
from unmoved.core.phases import Ramp, resolve
from unmoved.core.threat import ThreatModel
from unmoved.core.views import Views
from unmoved.terms import CE, DLR, KL, TRADES, Margin

LINF, L2 = ThreatModel("linf", 0.1), ThreatModel("l2", 0.6)


def loss_at(model, batch, x_adv, term=CE()):  # noqa: B008
    with torch.no_grad():
        return term(Views(model, batch, x_adv))


def accuracy(model, batch, x):
    return (model(x).argmax(1) == batch.y).float().mean().item()


def by_hand(model, batch, threat, steps, size):
    """A plain loop over samples: the textbook attack from the clean image, in linf."""
    result = []
    for x0, label in zip(batch.x, batch.y, strict=True):
        x = x0.clone()
        for _ in range(steps):
            x = x.detach().requires_grad_(True)
            nn.functional.cross_entropy(model(x[None]), label[None]).backward()
            moved = x.detach() + size * x.grad.sign()
            x = torch.minimum(torch.maximum(moved, x0 - threat.eps), x0 + threat.eps).clamp(0, 1)
        result.append(x)
    return torch.stack(result)


def test_is_the_textbook_loop(trained):
    model, batch = trained
    batch = Batch(batch.x[:8].double(), batch.y[:8])
    model = nn.Sequential(*model).double()
    ours = PGD(LINF, steps=5, step_size=0.03, start="none")(model, batch)
    assert torch.allclose(ours, by_hand(model, batch, LINF, 5, 0.03), atol=1e-9)
    model.float()
    model.zero_grad(set_to_none=True)


def test_fgsm_is_one_step_of_eps(trained):
    model, batch = trained
    x = batch.x.clone().requires_grad_(True)
    (g,) = torch.autograd.grad(nn.functional.cross_entropy(model(x), batch.y, reduction="sum"), x)
    assert torch.allclose(FGSM(LINF)(model, batch), (batch.x + 0.1 * g.sign()).clamp(0, 1), atol=1e-6)
    best = highest_in_l2(batch.x.flatten(1).double(), g.flatten(1).double(), 0.6).reshape(g.shape)
    assert torch.allclose(FGSM(L2)(model, batch), best.float(), atol=1e-4)


def highest_in_l2(x, g, eps):
    """The point of the ball cut by the box [0, 1] at which <g, x> is highest: clip(x + t g), t by bisection."""
    low, high = torch.zeros_like(x[:, :1]), 1e6 * torch.ones_like(x[:, :1]) / g.abs().amax(1, keepdim=True)
    for _ in range(200):
        t = (low + high) / 2
        is_inside = ((x + t * g).clamp(0, 1) - x).norm(dim=1, keepdim=True) <= eps
        low, high = torch.where(is_inside, t, low), torch.where(is_inside, high, t)
    return (x + low * g).clamp(0, 1)


@pytest.mark.parametrize("threat", [LINF, L2], ids=str)
def test_more_steps_restarts_and_eps_never_help_the_defender(trained, threat):
    """T14, T16: per sample, a success is final as restarts grow, and the loss rises with the budget."""
    model, batch = trained
    broken = torch.zeros(len(batch), dtype=torch.bool)
    for restarts in (1, 2, 4):
        x_adv = PGD(threat, steps=5, restarts=restarts, keep="best")(model, batch)
        wrong = model(x_adv).argmax(1) != batch.y
        assert (wrong | ~broken).all()
        broken = wrong
    radii = [PGD(ThreatModel(threat.norm, s * threat.eps), steps=20)(model, batch) for s in (0, 0.5, 1, 2)]
    accuracies = [accuracy(model, batch, x) for x in radii]
    assert accuracies == sorted(accuracies, reverse=True)
    assert accuracies[0] == accuracy(model, batch, batch.x)
    assert accuracies[0] > 0.95
    assert accuracies[-1] < 0.2


def test_best_includes_the_final_iterate_and_never_the_clean_image(trained):
    """T12, T13: with one step the final iterate is all there is; a failed attack still returns its best point."""
    model, batch = trained
    one = PGD(LINF, steps=1, step_size=0.1, start="none", keep="best")(model, batch)
    assert torch.equal(one, PGD(LINF, steps=1, step_size=0.1, start="none")(model, batch))
    small = ThreatModel("linf", 0.01)
    x_adv = PGD(small, steps=5, keep="best")(model, batch)
    robust = model(x_adv).argmax(1) == batch.y
    assert robust.float().mean() > 0.9
    assert (loss_at(model, batch, x_adv) > loss_at(model, batch, batch.x)).float().mean() > 0.99
    values = [loss_at(model, batch, PGD(small, steps=k, step_size=0.005, start="none")(model, batch)) for k in range(6)]
    best = PGD(small, steps=5, step_size=0.005, start="none", keep="best")(model, batch)
    top = torch.stack(values).max(0).values
    assert torch.allclose(loss_at(model, batch, best)[robust], top[robust], atol=1e-6)


def test_kl_needs_its_start(trained):
    """T8: at the clean image the gradient of KL is rounding noise; from the gaussian start it is not."""
    model, batch = trained
    with attacking(model, batch, LINF) as views:
        _, at_clean, _ = gradient_at(views, batch.x, KL())
        start = PGD(LINF, loss=KL(), start="gaussian", steps=0)(model, batch)
        _, at_start, _ = gradient_at(views, start, KL())
    assert at_clean.abs().max() < 1e-5
    assert at_start.abs().max() > 100 * at_clean.abs().max()
    moved = (start - batch.x).std()
    assert 0.0005 < moved < 0.0015
    x_adv = PGD(LINF, loss=KL(), start="gaussian")(model, batch)
    assert loss_at(model, batch, x_adv, KL()).mean() > 10 * loss_at(model, batch, start, KL()).mean()


def test_clean_logits_are_computed_once(trained):
    model, batch = trained
    calls = []
    handle = model.register_forward_hook(lambda *_: calls.append(1))
    PGD(LINF, loss=KL(), start="gaussian", steps=7)(model, batch)
    assert len(calls) == 8
    calls.clear()
    PGD(LINF, steps=7)(model, batch)
    handle.remove()
    assert len(calls) == 7


def test_any_objective_makes_an_adaptive_attack(trained):
    model, batch = trained
    for term in (Margin(), DLR(), TRADES(), KL()):
        start = "gaussian"
        x_adv = PGD(LINF, loss=term, start=start, steps=5)(model, batch)
        assert loss_at(model, batch, x_adv, term).mean() > loss_at(model, batch, batch.x, term).mean()


def test_a_loss_of_the_clean_view_is_refused(trained):
    model, batch = trained
    with pytest.raises(UnmovedError, match=r"CE\(view='clean'.*adversarial view"):
        PGD(LINF, loss=CE("clean"))(model, batch)
    detached = nn.Sequential(nn.Flatten(), nn.Linear(64, 4))

    class Blind(nn.Module):
        def forward(self, x):
            return detached(x.detach())

    with pytest.raises(UnmovedError, match="does not exist"):
        PGD(LINF)(Blind(), batch)


def test_bf16_finds_nearly_the_same_signs_and_never_stands_still(trained):
    """T9, T10: the reduced-precision attack moves, and raises the float32 loss about as far."""
    model, batch = trained
    exact = FGSM(LINF)(model, batch)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        coarse = FGSM(LINF)(model, batch)
    assert coarse.dtype == torch.float32
    agree = ((exact - batch.x).sign() == (coarse - batch.x).sign()).float().mean()
    assert agree > 0.9
    assert loss_at(model, batch, coarse).mean() > 0.95 * loss_at(model, batch, exact).mean()


def test_summed_loss_survives_a_saturated_model(trained):
    """T10: sum, not mean: the gradient of one sample does not shrink with the batch."""
    model, batch = trained
    from unmoved.attacks.gradients import attacking, gradient_at

    with attacking(model, batch, LINF) as views:
        _, whole, _ = gradient_at(views, batch.x, CE())
        _, single, _ = gradient_at(views.take(torch.tensor([5])), batch.x[5:6], CE())
    assert torch.allclose(whole[5:6], single, atol=1e-6)


def test_zero_gradient_is_no_nan():
    """T11."""
    flat = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
    nn.init.zeros_(flat[1].weight)
    batch = Batch(torch.rand(2, 1, 2, 2), torch.tensor([0, 1]))
    for threat in (LINF, L2):
        for attack in (PGD(threat), APGD(threat, steps=5)):
            assert torch.isfinite(attack(flat, batch)).all()


def test_noise_belongs_to_the_sample_the_step_and_the_seed(trained):
    """T6, T15: the start does not depend on batch size or order, and a new step draws anew."""
    model, batch = trained
    start = PGD(LINF, steps=0)
    whole = start(model, batch)
    some = torch.tensor([7, 3, 200])
    assert torch.equal(start(model, batch.take(some)), whole[some])
    later = Batch(batch.x, batch.y, batch.index, step=1)
    assert not torch.equal(start(model, later), whole)
    assert not torch.equal(PGD(LINF, steps=0, seed=1)(model, batch), whole)


def test_step_size_follows_a_ramp():
    ramped = PGD(ThreatModel("linf", Ramp(0.0, 0.3, over=0.5)), step_size=Ramp(0.0, 0.1))
    assert resolve(ramped, 0.25).threat.eps == pytest.approx(0.15)
    assert resolve(ramped, 0.25).step_size == pytest.approx(0.025)
    model, batch = nn.Sequential(nn.Flatten(), nn.Linear(4, 3)), Batch(torch.rand(2, 1, 2, 2), torch.tensor([0, 1]))
    with pytest.raises(UnmovedError, match="only the training loop resolves ramps"):
        ramped(model, batch)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": -1}, "PGD.steps: expected a whole number >= 0, came -1"),
        ({"restarts": 0}, "PGD.restarts"),
        ({"start": "unifrom"}, "did you mean 'uniform'"),
        ({"keep": "first"}, "PGD.keep"),
        ({"mode": "test"}, "PGD.mode"),
        ({"step_size": -0.1}, "PGD.step_size"),
        ({"stop": Sensible(0.5), "keep": "best"}, "keep"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(UnmovedError, match=message):
        PGD(LINF, **settings)


# --- APGD


def test_apgd_is_at_least_as_strong_as_pgd(trained):
    model, batch = trained
    for threat in (ThreatModel("linf", 0.06), ThreatModel("l2", 0.4)):
        pgd = accuracy(model, batch, PGD(threat, steps=20, keep="best")(model, batch))
        apgd = accuracy(model, batch, APGD(threat, steps=100)(model, batch))
        assert 0 < apgd <= pgd + 0.01


def pace_of(samples, steps=100, compat=False, first=0.0):
    x = torch.zeros(samples, 1, 1, 1)
    return MomentumSteps(ThreatModel("linf", 0.1), x, x, torch.full((samples,), first), x, steps, compat)


def test_apgd_checkpoints_are_the_papers():
    """T27: for 100 steps they fall after steps 22, 41, 57, 70, 80, 87, 93, 99 (counted from 1)."""
    seen, pace = [], pace_of(1)
    for step in range(100):
        before = pace.next_check
        pace.observe(pace.x, torch.zeros(1), pace.x, step)
        if pace.next_check != before:
            seen.append(step)
    assert seen == [21, 40, 56, 69, 79, 86, 92, 98]


def test_apgd_halves_where_the_loss_stops_rising():
    pace = pace_of(2)
    for step in range(22):  # the first sample rises at each step, the second never
        value = torch.tensor([float(step + 1), 0.0])
        x_adv, _ = pace.observe(torch.full_like(pace.x, step + 1.0), value, pace.x, step)
    assert x_adv.flatten().tolist() == [22.0, 0.0], "the second goes back to its best point, the first goes on"
    assert pace.step_size.flatten().tolist() == pytest.approx([0.2, 0.1])


def test_apgd_halves_where_the_loss_goes_up_and_down():
    """Condition 1 counts rises over the step before, not over the start: 11 of 22 are fewer than three quarters."""
    pace = pace_of(1)
    for step in range(22):
        pace.observe(pace.x, torch.tensor([2.0 if step % 2 == 0 else 1.0]), pace.x, step)
    assert bool(pace.halved)


def test_apgd_halves_where_a_whole_stretch_of_rises_finds_nothing_better():
    """Condition 2: 22 rises to 22, then 18 of 19 that end below: the step is halved, and the best point taken up."""
    pace = pace_of(1)
    for step in range(41):
        value = step + 1.0 if step < 22 else step - 21.0
        x_adv, _ = pace.observe(torch.full_like(pace.x, value), torch.tensor([value]), pace.x, step)
        assert bool(pace.step_size == 0.2) == (step < 40)
    assert x_adv.item() == 22.0


def test_apgd_compat_counts_the_first_rise_from_zero():
    """T27: the authors' code compares the first loss with an empty slot: 17 rises of 22 suffice, 16 do not."""
    halved = {}
    for compat in (False, True):
        pace = pace_of(1, compat=compat, first=9.0)
        values = [5.0 + k for k in range(17)] + [1.0] * 5  # 16 rises after the first value
        for step, value in enumerate(values):
            pace.observe(pace.x, torch.tensor([value]), pace.x, step)
        halved[compat] = bool(pace.halved)
    assert halved == {False: True, True: False}


def test_apgd_starts_on_the_surface():
    batch = Batch(torch.full((4, 1, 3, 3), 0.5), torch.zeros(4, dtype=torch.long))
    for threat in (LINF, ThreatModel("l2", 0.4)):
        start = APGD(threat)._start(batch, Round(0))
        assert torch.allclose(
            threat.distance(start, batch.x), torch.full((4,), threat.eps, dtype=torch.float64), atol=1e-6
        )


# --- stopping rules


def confidence(model, batch, x):
    return model(x).softmax(1).gather(1, batch.y[:, None]).squeeze(1)


def test_sensible_keeps_confidence_above_c(trained):
    model, batch = trained
    for c in (0.1, 0.5, 0.9):
        attack = PGD(LINF, steps=10, stop=Sensible(c))
        x_adv, start = attack(model, batch), PGD(LINF, steps=0)(model, batch)
        p, p_start = confidence(model, batch, x_adv), confidence(model, batch, start)
        stopped_at_start = (p_start < c) | (model(start).argmax(1) != batch.y)
        assert torch.equal(x_adv[stopped_at_start], start[stopped_at_start])
        assert (p[~stopped_at_start] >= c - 1e-5).all()
        moved = (x_adv != start).flatten(1).any(1)
        assert moved[~stopped_at_start].float().mean() > 0.5
    assert torch.equal(PGD(LINF, stop=Sensible(1.0))(model, batch), batch.x)


@pytest.mark.parametrize("norm", ["l2", "linf"])
@pytest.mark.parametrize("c", [0.5, 0.7, 0.9])
def test_sensible_on_a_linear_model_is_its_closed_form(c, norm):
    """sense.md 3.2: keep x where p_y < c, take the full step where p_y stays above c, else stop at p_y = c."""
    draw = torch.Generator().manual_seed(0)
    b = torch.randn(16, generator=draw, dtype=torch.float64)
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 2, bias=False)).double()
    with torch.no_grad():
        model[1].weight.copy_(torch.stack([-b, b]) / 2)
    x = 0.5 * torch.randn(900, 1, 4, 4, generator=draw, dtype=torch.float64)
    score = x.flatten(1) @ b
    y = ((score > 0) ^ (torch.rand(900, generator=draw) < 0.2)).long()
    margin = score * (2 * y - 1)  # logit of p_y
    threat = ThreatModel(norm, 0.25 if norm == "l2" else 0.06, bounds=(-9.0, 9.0))
    direction = b / b.norm() if norm == "l2" else b.sign()
    full = margin - threat.eps * (direction @ b)
    at_c = math.log(c / (1 - c))
    expected = torch.where(margin < at_c, margin, full.clamp_min(at_c))
    size = threat.eps / 100
    x_adv = PGD(threat, steps=200, step_size=size, start="none", stop=Sensible(c))(model, Batch(x, y))
    ours = (x_adv.flatten(1) @ b) * (2 * y - 1)
    assert (ours >= expected - 1e-9).all()
    assert (ours <= expected + size * (direction @ b) + 1e-9).all()  # one step is undone, so at most one is missing
    cases = [(margin < at_c), (full > at_c), (margin >= at_c) & (full <= at_c)]
    assert all(case.sum() > 10 for case in cases)
    along = (x_adv - x).flatten(1)
    assert torch.allclose(along[cases[1]], -threat.eps * (2 * y[cases[1]] - 1)[:, None] * direction, atol=1e-9)


def test_sensible_warm_up_judges_the_start_alone(trained):
    model, batch = trained
    start = PGD(LINF, steps=0)(model, batch)
    full = PGD(LINF, steps=5)(model, batch)
    c = confidence(model, batch, start).median().item()
    x_adv = PGD(LINF, steps=5, stop=Sensible(c, adaptive=False))(model, batch)
    stays = confidence(model, batch, start) < c
    assert 0 < stays.sum() < len(batch)
    assert torch.equal(x_adv[stays], start[stays])
    # A smaller batch may round a vanishing gradient to the other sign, so nearly all pixels, not all.
    assert ((x_adv - full)[~stays].abs() < 1e-6).float().mean() > 0.99


def test_sensible_with_kl_judges_the_start_by_cross_entropy_and_the_rest_by_kl(trained):
    model, batch = trained
    c = 0.7
    start = PGD(LINF, steps=0)(model, batch)
    x_adv = PGD(LINF, loss=KL(), steps=8, stop=Sensible(c))(model, batch)
    stays = confidence(model, batch, start) < c
    assert torch.equal(x_adv[stays], start[stays])
    inside = loss_at(model, batch, x_adv, KL())[~stays]
    assert (
        inside <= torch.maximum(-torch.log(torch.tensor(c)), loss_at(model, batch, start, KL())[~stays]) + 1e-5
    ).all()


def test_friendly_stops_at_the_first_wrong_point(trained):
    model, batch = trained
    path = [PGD(LINF, steps=k, step_size=0.02)(model, batch) for k in range(11)]
    wrong = torch.stack([model(x).argmax(1) != batch.y for x in path])
    for tau in (0, 1, 2):
        x_adv = PGD(LINF, steps=10, step_size=0.02, stop=Friendly(tau))(model, batch)
        for i in range(len(batch)):
            left, stop_at = tau, 10
            for k in range(10):
                if wrong[k, i] and left == 0:
                    stop_at = k
                    break
                left -= int(wrong[k, i])
            assert torch.allclose(x_adv[i], path[stop_at][i], atol=1e-6), (tau, i)
    assert torch.equal(PGD(LINF, steps=10, stop=Friendly(10))(model, batch), PGD(LINF, steps=10)(model, batch))


def test_the_friendly_noise_is_drawn_anew_at_each_step():
    """Where the loss is flat the steps are noise alone: 16 of them go sqrt(16) times as far as one, not 16 times."""
    flat = nn.Sequential(nn.Flatten(), nn.Linear(64, 2))
    nn.init.zeros_(flat[1].weight)
    with torch.no_grad():
        flat[1].bias.copy_(torch.tensor([1.0, 0.0]))
    batch = Batch(torch.full((50, 1, 8, 8), 0.5), torch.zeros(50, dtype=torch.long))
    attack = PGD(LINF, steps=16, step_size=0.0, start="none", stop=Friendly(0, omega=0.001))
    away = attack(flat, batch) - batch.x
    assert away.std().item() == pytest.approx(0.004, rel=0.08)
    later = attack(flat, Batch(batch.x, batch.y, batch.index, step=1)) - batch.x
    assert abs((away * later).mean()) < 0.1 * away.var()


def test_each_restart_has_a_start_of_its_own(trained):
    _, batch = trained
    for start in ("uniform", "gaussian"):
        attack = PGD(LINF, start=start)
        first, again, second = (attack._start(batch, restart) for restart in (0, 0, 1))
        assert torch.equal(first, again)
        assert (first != second).float().mean() > 0.9


def test_stopped_samples_are_not_computed_again(trained):
    model, batch = trained
    sizes = []
    handle = model.register_forward_hook(lambda m, inputs, out: sizes.append(len(inputs[0])))
    PGD(ThreatModel("linf", 0.3), steps=10, stop=Friendly(0))(model, batch)
    handle.remove()
    assert sizes[0] == len(batch)
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[-1] < len(batch) / 4


@pytest.mark.parametrize("c", [0.0, -0.1, 1.1, math.nan])
def test_sensible_bounds(c):
    with pytest.raises(UnmovedError, match=r"Sensible.c: expected a finite number > 0 and <= 1"):
        Sensible(c)
