"""Defenses against brute force in float64, and against the field's known mistakes."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from unmoved import Batch, Method, train_step
from unmoved.core.errors import UnmovedError
from unmoved.defenses import APD, ASAM, AWP, SAM, Plain
from unmoved.terms import CE


def problem(seed=0):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).double()
    x, y = torch.randn(11, 5, dtype=torch.float64), torch.randint(3, (11,))
    return model, lambda m: nn.functional.cross_entropy(m(x), y)


def gradient(model, loss):
    return torch.autograd.grad(loss(model), list(model.parameters()))


def moved(model, corruption):
    other = copy.deepcopy(model)
    with torch.no_grad():
        for p, v in zip(other.parameters(), corruption, strict=True):
            p.add_(v)
    return other


def step(defense, model, loss, optimizer):
    def backward():
        value = loss(model)
        value.backward()
        return value.detach()

    return defense(model, optimizer, backward)


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9, weight_decay=0.05)


def by_hand(weights, gradients, velocity, lr=0.3, momentum=0.9, decay=0.05):
    """SGD with momentum and weight decay: the weights and the velocity after one step."""
    velocity = [momentum * v + g + decay * w for v, g, w in zip(velocity, gradients, weights, strict=True)]
    return [w - lr * v for w, v in zip(weights, velocity, strict=True)], velocity


def values(model):
    return [p.detach().clone() for p in model.parameters()]


def check(model, expected):
    for p, w in zip(model.parameters(), expected, strict=True):
        assert torch.allclose(p, w, rtol=0, atol=1e-11)


def test_sam_takes_the_gradient_at_the_worst_and_the_step_at_w():
    model, loss = problem()
    optimizer, velocity = sgd(model), [torch.zeros_like(p) for p in model.parameters()]
    for _ in range(3):
        g = gradient(model, loss)
        length = torch.sqrt(sum((part**2).sum() for part in g))
        at_worst = gradient(worst := moved(model, [0.1 * part / length for part in g]), loss)
        assert loss(worst) > loss(model)
        expected, velocity = by_hand(values(model), at_worst, velocity)
        returned = step(SAM(0.1), model, loss, optimizer)
        assert returned > 0
        check(model, expected)


def test_awp_steps_at_the_moved_weights_and_moves_back():
    """T20: per tensor, relative, weights of more than one dimension only; decay acts on w + v."""
    model, loss = problem()
    optimizer, velocity = sgd(model), [torch.zeros_like(p) for p in model.parameters()]
    for _ in range(3):
        g = gradient(model, loss)
        v = [
            0.02 * p.detach().norm() * part / part.norm() if p.ndim > 1 else torch.zeros_like(p)
            for p, part in zip(model.parameters(), g, strict=True)
        ]
        worst = moved(model, v)
        at_worst = gradient(worst, loss)
        after, velocity = by_hand(values(worst), at_worst, velocity)
        expected = [w - part for w, part in zip(after, v, strict=True)]
        step(AWP(0.02), model, loss, optimizer)
        check(model, expected)


def test_the_returned_loss_is_that_of_the_uncorrupted_weights():
    for defense in (Plain(), SAM(0.5), AWP(0.3)):
        model, loss = problem()
        before = loss(model).item()
        assert step(defense, model, loss, sgd(model)).item() == pytest.approx(before, abs=1e-12)


@pytest.mark.parametrize(("defense", "views"), [(Plain(), 1), (SAM(0.3), 1), (AWP(0.3), 1)])
def test_batchnorm_moves_in_the_uncorrupted_pass(defense, views):
    """T1, T20, T21: one tracked pass a step; SAM's is at w, AWP's at w + v, the one that it steps from."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 3)).double()
    x, y = torch.randn(16, 4, dtype=torch.float64), torch.randint(3, (16,))
    seen = []
    model[0].register_forward_hook(lambda m, i, out: seen.append(out.detach().mean(0)))
    step(defense, model, lambda m: nn.functional.cross_entropy(m(x), y), torch.optim.SGD(model.parameters(), lr=0.1))
    assert int(model[1].num_batches_tracked) == views
    tracked_pass = seen[-1] if isinstance(defense, AWP) else seen[0]
    assert torch.allclose(model[1].running_mean, 0.1 * tracked_pass)


DEFENSES = [Plain(), SAM(0.5), ASAM(0.5), AWP(0.3), APD(0.5), APD(0.5, p=math.inf, risk="last")]


@pytest.mark.parametrize("through_train_step", [False, True])
@pytest.mark.parametrize("defense", DEFENSES, ids=repr)
def test_only_what_the_optimizer_steps_is_corrupted_and_no_old_gradient_steers(defense, through_train_step):
    """With the head alone in the optimizer, a step is that of the head as a model of its own on the body's features."""
    model, _ = problem()
    body, head = model[0], model[2]
    x, y = torch.rand(11, 1, 1, 5, dtype=torch.float64), torch.arange(11) % 3
    features = torch.tanh(body(x.flatten(1))).detach()
    alone, optimizer = copy.deepcopy(head), torch.optim.SGD(head.parameters(), lr=0.3, momentum=0.9)
    other = torch.optim.SGD(alone.parameters(), lr=0.3, momentum=0.9)
    body.weight.grad = mine = torch.full_like(body.weight, 1e3)  # the caller's, from somewhere else
    before, seen = values(body), []
    body.register_forward_hook(lambda *_: seen.append(torch.equal(body.weight, before[0])))
    whole = nn.Sequential(nn.Flatten(), model)
    for _ in range(3):
        if through_train_step:
            train_step(whole, Method(None, CE("clean"), defense), optimizer, Batch(x, y), "float32")
            assert body.weight.grad is mine
            assert body.bias.grad is None
            assert (mine == 1e3).all()
        else:
            step(defense, model, lambda m: nn.functional.cross_entropy(m(x.flatten(1)), y), optimizer)
        step(defense, alone, lambda m: nn.functional.cross_entropy(m(features), y), other)
    check(head, values(alone))
    assert all(seen)
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("defense", DEFENSES[1:], ids=repr)
def test_a_model_that_the_optimizer_does_not_step_is_not_corrupted(defense):
    model, loss = problem()
    learned, before = nn.Parameter(torch.tensor(2.0, dtype=torch.float64)), values(model)
    step(defense, model, lambda m: loss(m) * learned, torch.optim.SGD([learned], lr=0.1))
    assert learned.item() == pytest.approx(2.0 - 0.1 * loss(model).item())
    check(model, before)


class Sees(nn.Module):
    """Keeps what it saw last, and how often, in new tensors."""

    def __init__(self):
        super().__init__()
        self.register_buffer("last", torch.zeros(6, dtype=torch.float64), persistent=False)
        self.register_buffer("passes", torch.tensor(0))

    def forward(self, x):
        self.last, self.passes = x.detach().mean(0), self.passes + 1
        return x


@pytest.mark.parametrize("defense", DEFENSES, ids=repr)
def test_every_buffer_moves_in_one_pass_of_a_step(defense):
    """What layers of anybody's remember is that of the plain step; for AWP that of the pass it steps from.

    What tells of the weights, such as their singular vectors, is that of the uncorrupted weights with every defense.
    """
    ends = []
    for each in (defense, Plain()):
        torch.manual_seed(0)
        first = torch.nn.utils.parametrizations.spectral_norm(nn.Linear(4, 6))
        old = torch.nn.utils.spectral_norm(nn.Linear(6, 6))
        model = nn.Sequential(first, Sees(), old, nn.Tanh(), nn.BatchNorm1d(6), nn.Linear(6, 3)).double()
        x, y = torch.randn(16, 4, dtype=torch.float64), torch.randint(3, (16,))
        seen = []
        model[1].register_forward_hook(lambda m, i, out, seen=seen: seen.append(out.detach().mean(0)))
        loss = lambda m: nn.functional.cross_entropy(m(x), y)  # noqa: B023, E731
        step(each, model, loss, torch.optim.SGD(model.parameters(), lr=0.0))
        assert model[1].passes == model[4].num_batches_tracked == 1
        assert torch.equal(model[1].last, seen[-1] if isinstance(each, AWP) else seen[0])
        ends.append(dict(model.named_buffers()))
    of_data = {"1.last", "4.running_mean", "4.running_var"} if isinstance(defense, AWP) else set()
    for name in ends[0].keys() - of_data:
        assert torch.equal(ends[0][name], ends[1][name]), name


def test_frozen_and_unused_parameters_are_left_alone():
    for defense in (SAM(0.1), AWP(0.1)):
        model, loss = problem()
        model[0].weight.requires_grad_(False)
        unused = nn.Linear(2, 2).double()
        model.add_module("unused", unused)
        forward = nn.Sequential(*list(model)[:3])
        before = model[0].weight.clone(), unused.weight.clone()
        step(defense, model, lambda m: loss(forward), sgd(model))  # noqa: B023
        assert torch.equal(before[0], model[0].weight)
        assert torch.equal(before[1], unused.weight)


def test_bad_strengths():
    with pytest.raises(UnmovedError, match=r"SAM.rho: expected a finite number >= 0, came -1"):
        SAM(-1)
    with pytest.raises(UnmovedError, match=r"AWP.gamma"):
        AWP(float("inf"))


# --- APD and ASAM


def apd_by_hand(model, loss, eps, steps, p, n, risk, step_size):
    """The gradient of APD with plain vectors: every corruption of a flat copy of the weights."""
    shapes = [q.shape for q in model.parameters()]
    w0 = torch.cat([q.detach().flatten() for q in model.parameters()])

    def gradient_at(a):
        other = copy.deepcopy(model)
        parts = (w0 + a).split([s.numel() for s in shapes])
        with torch.no_grad():
            for q, part, shape in zip(other.parameters(), parts, shapes, strict=True):
                q.copy_(part.reshape(shape))
        return torch.cat([g.flatten() for g in gradient(other, loss)])

    a = torch.zeros_like(w0)
    gradients = [gradient_at(a)]
    for _ in range(steps):
        g = gradients[-1]
        if p == 2:
            a = a + step_size * g / g.norm()
        else:
            largest = g.abs() >= g.abs().sort(descending=True).values[(n or len(g)) - 1]
            a = a + step_size * torch.where(largest, g.sign(), 0.0)
        if n is not None:
            smallest = a.abs().sort(descending=True).values[n - 1]
            a = torch.where(a.abs() >= smallest, a, 0.0)
        a = a * min(1.0, eps / a.norm().item()) if p == 2 else a.clamp(-eps, eps)
        gradients.append(gradient_at(a))
    total = sum(gradients) / (steps + 1) if risk == "mean" else gradients[-1]
    return [g.reshape(s) for g, s in zip(total.split([s.numel() for s in shapes]), shapes, strict=True)]


@pytest.mark.parametrize("risk", ["mean", "last"])
@pytest.mark.parametrize(("p", "n"), [(2, None), (2, 10), (math.inf, None), (math.inf, 10)])
@pytest.mark.parametrize("relative", [False, True])
def test_apd_is_the_mean_gradient_along_the_path(p, n, risk, relative):
    model, loss = problem()
    optimizer, velocity = sgd(model), [torch.zeros_like(q) for q in model.parameters()]
    for steps in (1, 2, 3) if (p, n) != (math.inf, 10) else (1,):  # later steps tie in linf: any n of them will do
        eps = 0.02 if p == 2 else 0.005
        scale = math.sqrt(sum(float((q.detach() ** 2).sum()) for q in model.parameters())) if relative else 1.0
        size = 0.6 * eps if steps == 2 else None
        by_paper = apd_by_hand(model, loss, scale * eps, steps, p, n, risk, scale * (size or 1.5 * eps / steps))
        expected, velocity = by_hand(values(model), by_paper, velocity)
        apd = APD(eps, steps=steps, p=p, n=n, risk=risk, step_size=size, relative=relative)
        step(apd, model, loss, optimizer)
        check(model, expected)


def test_apd_with_one_last_step_is_sam():
    results = []
    for defense in (SAM(0.1), APD(0.1, steps=1, risk="last")):
        model, loss = problem()
        optimizer = sgd(model)
        for _ in range(3):
            step(defense, model, loss, optimizer)
        results.append(values(model))
    assert all(torch.allclose(a, b, rtol=0, atol=1e-12) for a, b in zip(*results, strict=True))


def test_apd_averages_learned_terms_too():
    """Parameters of a term are not corrupted, but averaged and stepped like the rest."""
    model, loss = problem()
    theta = nn.Parameter(torch.tensor(1.0, dtype=torch.float64))
    optimizer = torch.optim.SGD([*model.parameters(), theta], lr=0.1)
    seen = []

    def coupled(m):
        seen.append(loss(m).item())
        return loss(m) * theta

    step(APD(0.1, steps=2), model, coupled, optimizer)
    assert theta.item() == pytest.approx(1.0 - 0.1 * sum(seen) / 3)


def test_asam_measures_in_units_of_the_weights():
    model, loss = problem()
    optimizer, velocity = sgd(model), [torch.zeros_like(q) for q in model.parameters()]
    for _ in range(2):
        g = gradient(model, loss)
        t = [
            q.detach().abs() + 0.01 if "weight" in name else torch.ones_like(q) for name, q in model.named_parameters()
        ]
        length = math.sqrt(sum(float(((a * b) ** 2).sum()) for a, b in zip(t, g, strict=True)))
        worst = moved(model, [0.3 * a**2 * b / length for a, b in zip(t, g, strict=True)])
        expected, velocity = by_hand(values(model), gradient(worst, loss), velocity)
        step(ASAM(0.3, eta=0.01), model, loss, optimizer)
        check(model, expected)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: APD(-0.1), r"APD.eps: expected a finite number >= 0, came -0.1"),
        (lambda: APD(0.1, steps=0), r"APD.steps"),
        (lambda: APD(0.1, p=3), r"APD.p"),
        (lambda: APD(0.1, risk="average"), r"APD.risk"),
        (lambda: APD(0.1, n=0), r"APD.n"),
        (lambda: ASAM(-1.0), r"ASAM.rho"),
    ],
)
def test_bad_strengths_of_apd_and_asam(make, message):
    with pytest.raises(UnmovedError, match=message):
        make()


def test_apd_refuses_more_corrupted_weights_than_there_are():
    model, loss = problem()
    before = values(model)
    with pytest.raises(UnmovedError, match=r"n: expected a whole number >= 1 and <= 66, came 1000"):
        step(APD(0.1, n=1000), model, loss, sgd(model))
    check(model, before)
