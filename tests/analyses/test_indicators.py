"""I_ave and I_max: quadratics whose indicators are known, then models, whose hidden state stays as it was."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pandas as pd
import pytest
import torch
from helpers.function_risk import FunctionRisk
from torch import nn
from torch.nn import functional as F

from unmoved import Batch
from unmoved.analyses.corruption import direction, expected_ratio, sweep, worst_change
from unmoved.analyses.risks import ModelRisk, layers
from unmoved.core.errors import UnmovedError

NORMS = pytest.mark.parametrize("p", [2, math.inf])
SPARSE = pytest.mark.parametrize("n", [None, 3])


def draw(seed=0):
    return torch.Generator().manual_seed(seed)


def quadratic(k=10, seed=0, slope=1.0, h=None, base=0.0):
    """(risk, g, H) with L(w + a) = c + g.a + a'Ha/2 over two tensors; H is indefinite unless it is given."""
    generator = draw(seed)
    whole = torch.randn(k, generator=generator, dtype=torch.float64)
    g = slope * torch.randn(k, generator=generator, dtype=torch.float64)
    if h is None:
        root = torch.randn(k, k, generator=generator, dtype=torch.float64)
        h = (root + root.T) / 2 + torch.eye(k, dtype=torch.float64)
    first, second = whole[:2].clone().requires_grad_(), whole[2:].reshape(2, -1).clone().requires_grad_()

    def value():
        a = torch.cat([first, second.flatten()]) - whole
        return base + g @ a + a @ h @ a / 2

    return FunctionRisk(value, [first, second]), g, h


def flat(parts):
    return torch.cat([part.detach().flatten() for part in parts])


# --- random corruptions


@NORMS
@SPARSE
def test_a_random_corruption_lies_on_the_sphere_and_uses_every_coordinate_alike(p, n):
    """apd.md 1.4: second moment 1/k (p = 2); for signs 1 each, or n/k."""
    risk = quadratic()[0]
    r = torch.stack([flat(direction(risk, j, p=p, n=n)) for j in range(800)])
    torch.testing.assert_close(torch.linalg.vector_norm(r, ord=p, dim=1), torch.ones(800, dtype=torch.float64))
    assert (r != 0).sum(1).eq(n or 10).all()
    moment = (n or 10) / 10 if p == math.inf else 1 / 10
    assert ((r**2).mean(0) - moment).abs().max() < 5 * (r**2).std(0).max() / 800**0.5 + 1e-12
    assert (r.mean(0).abs() < 5 * moment**0.5 / 800**0.5).all()
    off_diagonal = (r.T @ r / 800 - moment * torch.eye(10)).abs().fill_diagonal_(0)
    assert off_diagonal.max() < 5 * moment / 800**0.5


@NORMS
@SPARSE
def test_the_average_is_the_trace_to_second_order(p, n):
    """apd.md 1.4 (1), (3): a quadratic has no higher order, so E[DL] = E||r||_2^2 tr(H) / 2k exactly."""
    risk, _, h = quadratic(slope=0.3)
    eps = 0.5
    changes = sweep(risk, [eps], relative=False, p=p, n=n, draws=800, steps=0, seed=1)["loss_change"]
    error = changes.std() / 800**0.5
    scale = eps**2 if p == 2 else eps**2 * (n or 10)
    expected = scale * h.trace().item() / 20
    assert abs(changes.mean() - expected) < 3 * error
    assert error < 0.1 * abs(expected)  # so that the line above can fail
    assert len(changes) == 800


def test_without_the_slope_the_average_has_a_fraction_of_the_noise():
    risk, _, h = quadratic(slope=20.0)
    table = sweep(risk, [0.1], relative=False, draws=400, steps=0)
    controlled = table["loss_change"] - table["linear_change"]
    expected = 0.1**2 * h.trace().item() / 20
    assert abs(controlled.mean() - expected) < 3 * controlled.std() / 20
    assert controlled.std() < table["loss_change"].std() / 20


# --- the closed form of the first-order ratio


def test_the_expected_ratio_in_closed_form():
    assert [expected_ratio(k) for k in (1, 2, 3)] == pytest.approx([1, 2 / math.pi, 0.5])
    assert expected_ratio(1000) == pytest.approx(0.0252, abs=5e-5)
    for k in (10**5, 10**7, 10**10):
        assert expected_ratio(k) == pytest.approx(math.sqrt(2 / (math.pi * k)), rel=1 / k)
    direct = [math.gamma(k / 2) / (math.sqrt(math.pi) * math.gamma((k + 1) / 2)) for k in range(1, 200)]
    assert [expected_ratio(k) for k in range(1, 200)] == pytest.approx(direct, rel=1e-12)
    with pytest.raises(UnmovedError, match="expected_ratio: k"):
        expected_ratio(0)


@pytest.mark.parametrize("k", [4, 10, 60])
def test_random_steps_reach_the_expected_share_of_the_worst_first_order_effect(k):
    table = sweep(quadratic(k)[0], [0.1], relative=False, draws=600, steps=0)
    eta = table["first_order"]
    assert abs(eta.mean() - expected_ratio(k)) < 3 * eta.std() / 600**0.5
    assert eta.between(0, 1).all()


@NORMS
@SPARSE
def test_the_first_order_ratio_is_against_the_worst_of_the_same_set(p, n):
    risk, g, _ = quadratic()
    table = sweep(risk, [0.2], relative=False, p=p, n=n, draws=5, steps=0)
    largest = g.abs().sort(descending=True).values[:n]
    dual = torch.linalg.vector_norm(largest, ord=1 if p == math.inf else 2).item()
    r_g = [(flat(direction(risk, j, p=p, n=n)) @ g).item() for j in range(5)]
    assert table["first_order"].tolist() == pytest.approx([abs(value) / dual for value in r_g])
    assert table["linear_change"].tolist() == pytest.approx([0.2 * value for value in r_g])


# --- the attack


@NORMS
@SPARSE
@pytest.mark.parametrize("steps", [1, 2, 10])
def test_a_linear_risk_gives_the_dual_norm(p, n, steps):
    """apd.md 1.5: eps ||h||_q with h the n largest entries of the gradient, whatever the number of steps."""
    risk, g, _ = quadratic(h=torch.zeros(10, 10, dtype=torch.float64))
    worst = worst_change(risk, 0.7, p=p, n=n, steps=steps)
    largest = g.abs().sort(descending=True).values[:n]
    q = 1 if p == math.inf else 2
    assert worst.value == pytest.approx(0.7 * torch.linalg.vector_norm(largest, ord=q).item())
    assert torch.linalg.vector_norm(flat(worst.corruption), ord=p).item() == pytest.approx(0.7)
    assert len(worst.path) == steps
    assert worst.value == max(worst.path)


@pytest.mark.parametrize("seed", range(3))
def test_without_a_slope_the_worst_direction_is_the_top_eigenvector(seed):
    """g = 0, so the attack starts along a random direction: I_max = eps^2 lambda / 2."""
    risk, _, h = quadratic(slope=0.0, seed=seed)
    values, vectors = torch.linalg.eigh(h)
    worst = worst_change(risk, 0.5, steps=200, step_size=0.5)
    assert worst.value == pytest.approx(0.5**2 * values[-1].item() / 2, rel=1e-6)
    assert abs(flat(worst.corruption) @ vectors[:, -1]).item() == pytest.approx(0.5, rel=1e-4)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("n", [None, 2])
def test_no_point_of_the_ball_is_much_worse_than_what_the_attack_finds(seed, n):
    """Brute force in four dimensions, over every support; the attack must not leave the set either."""
    risk, g, h = quadratic(4, seed)
    worst = worst_change(risk, 0.4, n=n, steps=50)
    a = torch.randn(40_000, 4, generator=draw(seed), dtype=torch.float64)
    supports = torch.zeros(40_000, 4, dtype=torch.float64)
    subsets = list(itertools.combinations(range(4), n or 4))
    for k, subset in enumerate(subsets):
        supports[k :: len(subsets), list(subset)] = 1
    a = 0.4 * F.normalize(a * supports, dim=1)
    brute = (a @ g + ((a @ h) * a).sum(1) / 2).max().item()
    # The support is the combinatorial part: the first steps choose it, and not always the best.
    assert (0.97 if n is None else 0.9) * brute < worst.value < brute + 0.01 * abs(brute)
    found = flat(worst.corruption)
    assert (found != 0).sum() <= (n or 4)
    assert found.norm() <= 0.4 * (1 + 1e-12)
    assert (g @ found + found @ h @ found / 2).item() == pytest.approx(worst.value)


@NORMS
def test_several_steps_beat_one_where_the_risk_bends(p):
    better = 0
    for seed in range(10):
        risk = quadratic(seed=seed, slope=0.3)[0]
        one, many = (worst_change(risk, 0.5, p=p, steps=steps).value for steps in (1, 20))
        assert many > 0.98 * one
        better += many > 1.05 * one
    assert better >= 5


def test_a_risk_that_only_falls_has_an_indicator_of_zero():
    risk, _, _ = quadratic(slope=0.0, h=-torch.eye(10, dtype=torch.float64))
    worst = worst_change(risk, 0.5)
    assert worst.value == 0
    assert not flat(worst.corruption).any()
    assert worst.path[0] < 0
    assert max(worst.path) <= 0
    table = sweep(risk, [0.5], draws=2)
    assert table.loc[table["kind"] == "adversarial", "loss_change"].tolist() == [0]


# --- models


def network(dtype=torch.float64):
    """In training, but with one BatchNorm frozen, statistics of its own, and one parameter that holds a gradient."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(
            nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Dropout(0.5), nn.Flatten(), nn.Linear(48, 4)
        )
        net(torch.rand(8, 1, 6, 6))
    net.to(dtype)
    net[1].eval()
    net[0].weight.grad = torch.ones_like(net[0].weight)
    return net


def images(count=23, dtype=torch.float64):
    return Batch(
        torch.rand(count, 1, 6, 6, generator=draw(), dtype=dtype), torch.randint(4, (count,), generator=draw(1))
    )


def everything(net):
    bits = [(name, value.numpy().tobytes()) for name, value in net.state_dict().items()]
    flags = [(m.training, getattr(m, "track_running_stats", None)) for m in net.modules()]
    grads = [(p.requires_grad, None if p.grad is None else p.grad.tolist()) for p in net.parameters()]
    return bits, flags, grads, torch.get_rng_state().tolist()


def test_a_point_is_the_mean_cross_entropy_its_accuracy_and_its_gradient():
    net, batch = network(), images()
    risk = ModelRisk(net, [batch.take(torch.arange(9)), batch.take(torch.arange(9, 23))], batch_size=4)
    with risk.held():
        point = risk.at(gradient=True)
    logits = network().eval()(batch.x)
    assert point.loss == pytest.approx(F.cross_entropy(logits, batch.y).item(), rel=1e-12)
    assert point.accuracy == (logits.argmax(1) == batch.y).double().mean().item()
    reference = network().eval()
    loss = F.cross_entropy(reference(batch.x), batch.y)
    for ours, theirs in zip(point.gradient, torch.autograd.grad(loss, list(reference.parameters())), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-14)
    assert risk.images == 23


SETTINGS = [{}, {"p": math.inf, "relative": False}, {"n": 5}]


@pytest.mark.parametrize("settings", SETTINGS)
def test_chunks_do_not_show(settings):
    tables = [
        sweep(ModelRisk(network(), [images()], batch_size=size), [0.01, 0.1], draws=3, steps=3, **settings)
        for size in (1, 7, 1000)
    ]
    for other in tables[1:]:
        pd.testing.assert_frame_equal(tables[0], other, rtol=1e-9, atol=1e-13)
    single = sweep(ModelRisk(network(torch.float32), [images()]), [0.01, 0.1], draws=3, steps=3, **settings)
    np.testing.assert_allclose(single["loss"], tables[0]["loss"], rtol=1e-4)


@pytest.mark.parametrize("settings", SETTINGS)
def test_everything_is_as_it_was(settings):
    net = network()
    before = everything(net)
    for scope in ("global", "5.weight"):
        sweep(ModelRisk(net, [images()], scope=scope), [0.1], draws=2, steps=3, **settings)
        assert everything(net) == before


class Failure(Exception):
    """What goes wrong in a forward pass."""


@pytest.mark.parametrize("fails_at", [1, 2, 4, 6])
def test_everything_is_as_it_was_after_a_failure_too(fails_at):
    net, calls = network(), itertools.count(1)
    before = everything(net)

    def fail(*_):
        torch.rand(1)
        if next(calls) == fails_at:
            raise Failure

    hook = net[-1].register_forward_hook(fail)
    with pytest.raises(Failure):
        sweep(ModelRisk(net, [images()]), [0.1], draws=3, steps=3)
    hook.remove()
    assert everything(net) == before
    assert next(calls) == fails_at + 1


def test_a_function_that_raises_leaves_its_parameters_as_they_were():
    w = torch.randn(5, generator=draw()).requires_grad_()
    before, calls = w.detach().numpy().tobytes(), itertools.count(1)

    def value():
        if next(calls) == 3:
            raise Failure
        return (w**2).sum()

    with pytest.raises(Failure):
        sweep(FunctionRisk(value, [w]), [0.1], draws=5)
    assert w.detach().numpy().tobytes() == before
    assert w.grad is None


def test_every_pass_is_used_and_none_is_made_twice():
    net, passes = network(), []
    net.register_forward_hook(lambda *_: passes.append(torch.is_grad_enabled()))
    sweep(ModelRisk(net, [images()]), [0.01, 0.1], draws=4, steps=3)
    assert len(passes) == 1 + 2 * (4 + 3)
    assert sum(passes) == 1 + 2 * (3 - 1)


def test_corruptions_are_of_the_scope_alone_and_of_the_stated_size():
    for scope in ("global", "0.weight", "5.weight"):
        net, seen = network(), []
        net.register_forward_pre_hook(lambda m, *_, s=seen: s.append([p.detach().clone() for p in m.parameters()]))
        risk = ModelRisk(net, [images()], scope=scope)
        table = sweep(risk, [0.05, 0.2], draws=2, steps=2)
        names = [name for name, _ in net.named_parameters()]
        moved = [[flat([after]) - flat([p]) for after, p in zip(s, net.parameters(), strict=True)] for s in seen[1:]]
        for parts in moved:
            changed = [name for name, part in zip(names, parts, strict=True) if part.any()]
            assert changed == (names if scope == "global" else [scope])
        size = flat(risk.parameters).norm().item()
        assert table["eps"].tolist() == pytest.approx((table["eps_relative"] * size).tolist())
        np.testing.assert_allclose(sorted({round(v, 9) for v in table["eps_relative"]}), [0.05, 0.2])
        lengths = [flat(parts).norm().item() / size for parts in moved]
        assert lengths[:4] == pytest.approx([0.05, 0.2, 0.05, 0.2])  # random: every eps with one draw
        assert max(lengths) <= 0.2 * (1 + 1e-9)
        assert set(table["k"]) == {sum(p.numel() for p in risk.parameters)}


def test_the_same_seed_gives_the_same_table_and_draws_are_shared():
    few, many = (sweep(ModelRisk(network(), [images()]), [0.01, 0.1], draws=d, steps=2) for d in (2, 4))
    pd.testing.assert_frame_equal(few, many[~(many["draw"] >= 2)].reset_index(drop=True))
    random = many[many["kind"] == "random"]
    per_draw = (random["linear_change"] / random["eps"]).groupby(random["draw"])
    assert (per_draw.max() - per_draw.min()).abs().max() < 1e-12
    assert per_draw.mean().nunique() == 4
    other = sweep(ModelRisk(network(), [images()]), [0.01, 0.1], draws=4, steps=2, seed=1)
    assert not set(other["linear_change"].dropna()) & set(random["linear_change"])
    assert other[other["kind"] == "adversarial"].equals(many[many["kind"] == "adversarial"])


def test_the_table_is_tidy():
    table = sweep(ModelRisk(network(), [images()], scope="5.weight"), [0.1, 0.01], n=7, draws=2, steps=3)
    assert table["kind"].tolist() == ["adversarial", "random", "random"] * 2
    assert table["draw"].isna().tolist() == [True, False, False] * 2
    assert table["steps"].tolist() == [3, 0, 0] * 2
    assert set(table["n"]) == {7}
    assert set(table["scope"]) == {"5.weight"}
    np.testing.assert_allclose(table["loss_change"], table["loss"] - table["clean_loss"])
    np.testing.assert_allclose(table["accuracy_change"], table["accuracy"] - table["clean_accuracy"])
    assert sweep(quadratic()[0], [0.1], draws=1)["accuracy"].isna().all()


def test_the_model_is_in_evaluation_mode_without_autocast_and_in_any_grad_mode():
    net = network(torch.float32)
    kinds = set()
    net.register_forward_hook(
        lambda m, _, out: kinds.add((out.dtype, m.training, any(c.training for c in m.modules())))
    )
    plain = sweep(ModelRisk(net, [images(dtype=torch.float32)]), [0.1], draws=2, steps=2)
    for guard in (torch.no_grad(), torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16)):
        with guard:
            batch = images(dtype=torch.float32)
            assert sweep(ModelRisk(net, [batch]), [0.1], draws=2, steps=2).equals(plain)
    assert kinds == {(torch.float32, False, False)}


class Noisy(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = network()

    def forward(self, x):
        return self.inner(x) + torch.randn(len(x), 4, dtype=x.dtype)


def test_a_randomised_model_meets_the_same_noise_everywhere():
    net = Noisy()
    before = everything(net)
    first, again = (sweep(ModelRisk(net, [images()]), [1e-9], draws=1, steps=1) for _ in range(2))
    assert first.equals(again)
    assert first["loss_change"].abs().max() < 1e-6
    assert everything(net) == before


def test_layers_of_one_shape_have_directions_of_their_own():
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    batch = Batch(torch.rand(3, 4), torch.zeros(3, dtype=torch.long))
    one, other = (direction(ModelRisk(net, [batch], scope=f"{k}.weight"), 0)[0] for k in range(2))
    assert one.shape == other.shape
    assert not (one == other).any()


def test_layers_are_the_tensors_of_more_than_one_dimension():
    net = network()
    assert layers(net) == ["0.weight", "5.weight"]
    net[0].weight.requires_grad_(False)
    assert layers(net) == ["5.weight"]
    assert len(ModelRisk(net, [images()]).parameters) == 5


# --- errors


BAD = [
    (lambda: ModelRisk(network(), []), "at least one image"),
    (lambda: ModelRisk(network(), [images()], scope="5.wieght"), "did you mean '5.weight'"),
    (lambda: ModelRisk(network().half(), [images()]), "came torch.float16"),
    (lambda: ModelRisk(network().requires_grad_(False), [images()]), "at least one parameter"),
    (lambda: ModelRisk(network(), [images()], batch_size=0), "batch_size"),
    (lambda: sweep(quadratic()[0], []), "at least one eps"),
    (lambda: sweep(quadratic()[0], [0.0]), "eps: expected a finite number > 0"),
    (lambda: sweep(quadratic()[0], [0.1], p=3), "p: unknown value 3"),
    (lambda: sweep(quadratic()[0], [0.1], n=11), "n: expected a whole number >= 1 and <= 10"),
    (lambda: sweep(quadratic()[0], [0.1], draws=-1), "draws"),
    (lambda: worst_change(quadratic()[0], 0.1, steps=0), "steps"),
    (lambda: worst_change(quadratic()[0], -0.1), "eps"),
]


@pytest.mark.parametrize(("call", "message"), BAD)
def test_bad_settings(call, message):
    with pytest.raises(UnmovedError, match=message):
        call()


def test_bad_risks():
    broken = network()
    with torch.no_grad():
        broken[-1].bias.fill_(math.inf)
    with pytest.raises(UnmovedError, match="finite loss, came nan"):
        worst_change(ModelRisk(broken, [images()]), 0.1)
    batch = Batch(images().x, images().y + 1)
    with pytest.raises(UnmovedError, match=r"expected 0\.\.3 for 4 logits, came 4"):
        sweep(ModelRisk(network(), [batch]), [0.1])
    zero = torch.zeros(3, requires_grad=True)
    with pytest.raises(UnmovedError, match="relative=False"):
        sweep(FunctionRisk(lambda: zero.sum(), [zero]), [0.1])
