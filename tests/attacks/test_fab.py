"""FAB against closed forms, against the textbook loop, and against itself in other batches."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from unmoved.attacks.fab import FAB
from unmoved.attacks.hyperplanes import dual_length, length, to_hyperplane
from unmoved.attacks.minimum_norm import searching
from unmoved.attacks.rounds import Round
from unmoved.core.batch import Batch
from unmoved.core.errors import UnmovedError
from unmoved.core.threat import ThreatModel
from unmoved.core.views import ranked_wrong

BALLS = [ThreatModel("linf", 0.12), ThreatModel("l2", 0.7), ThreatModel("l1", 2.5)]


@pytest.fixture(scope="module")
def exact(trained):
    """The trained network in float64 with 24 samples, some of them misclassified."""
    model, batch = trained
    y = batch.y[:24].clone()
    y[[3, 11]] = (y[[3, 11]] + 1) % 4
    return copy.deepcopy(model).double(), Batch(batch.x[:24].double(), y, torch.arange(24) + 7)


def linear(num_classes, seed=0):
    draw = torch.Generator().manual_seed(seed)
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, num_classes)).double()
    with torch.no_grad():
        model[1].weight.copy_(torch.randn(num_classes, 16, generator=draw, dtype=torch.float64))
        model[1].bias.copy_(-0.5 * model[1].weight.sum(1))  # all boundaries meet in the middle of the box
    x = 0.5 + 0.05 * torch.randn(64, 1, 4, 4, generator=draw, dtype=torch.float64)
    return model, Batch(x, model(x).argmax(1))


def distances(threat, batch, x_adv):
    return length((x_adv - batch.x).flatten(1), threat.norm)


def wrong(model, batch, x):
    with torch.no_grad():
        return model(x).argmax(1) != batch.y


# --- oracles


@pytest.mark.parametrize("threat", BALLS, ids=str)
@pytest.mark.parametrize("num_classes", [2, 6])
@pytest.mark.parametrize("targeted", [True, False])
def test_on_a_linear_model_the_nearest_point_is_known(threat, num_classes, targeted):
    """min over k of (z_y - z_k) / ||w_y - w_k||_dual, where the box does not bind."""
    model, batch = linear(num_classes)
    z, w = model(batch.x).detach(), model[1].weight.detach()
    others = ranked_wrong(z, batch.y)
    gaps = z.gather(1, batch.y[:, None]) - z.gather(1, others)
    sizes = torch.stack([dual_length(w[batch.y] - w[others[:, k]], threat.norm) for k in range(num_classes - 1)], 1)
    best = (gaps / sizes).min(1).values
    unbound = best < (0.3 if threat.norm != "l2" else 0.4)
    assert unbound.sum() > 50
    x_adv = FAB(threat, steps=20, targeted=targeted)(model, batch)
    assert wrong(model, batch, x_adv).all()
    ratio = (distances(threat, batch, x_adv) / best)[unbound]
    assert (ratio >= 1 - 1e-9).all()
    assert (ratio <= 1.05).all()


def by_hand(model, x, y, target, norm, steps, alpha_max=0.1, eta=1.05, beta=0.9):
    """Algorithm 1 for one sample and one target."""
    x1, found, nearest = x, torch.inf, x
    for _ in range(steps):
        leaf = x1.clone().requires_grad_(True)
        z = model(leaf[None])[0]
        f = z[target] - z[y]
        (w,) = torch.autograd.grad(f, leaf)
        row = w.reshape(1, -1)
        d1 = to_hyperplane(x1.reshape(1, -1), row, f.detach()[None], norm)
        d2 = to_hyperplane(x.reshape(1, -1), row, (f.detach() + (w * (x - x1)).sum())[None], norm)
        a1, a2 = max(length(d1, norm).item(), 1e-8), max(length(d2, norm).item(), 1e-8)
        alpha = min(a1 / (a1 + a2), alpha_max)
        x1 = (1 - alpha) * (x1 + eta * d1.reshape(x.shape)) + alpha * (x + eta * d2.reshape(x.shape))
        x1 = x1.clamp(0, 1).detach()
        z = model(x1[None])[0].detach()
        lead = float(z[torch.arange(len(z)) != y].max() - z[y])
        # Where the model is linear the walk comes back to the boundary exactly, and argmax would be rounding's choice.
        if lead > 1e-12:
            away = length((x1 - x).reshape(1, -1), norm).item()
            if away < found:
                found, nearest = away, x1
        if lead > -1e-12:
            x1 = x + beta * (x1 - x)
    return found, nearest


@pytest.mark.parametrize("threat", BALLS, ids=str)
def test_is_the_papers_loop(exact, threat):
    model, batch = exact
    x_adv = FAB(threat, steps=6, targets=2)(model, batch)
    order = ranked_wrong(model(batch.x).detach(), batch.y)
    for i in range(12):
        if model(batch.x[i : i + 1]).argmax() != batch.y[i]:
            assert torch.equal(x_adv[i], batch.x[i])
            continue
        tries = [by_hand(model, batch.x[i], batch.y[i], order[i, rank], threat.norm, 6) for rank in (0, 1)]
        assert torch.allclose(x_adv[i], min(tries, key=lambda one: one[0])[1], rtol=0, atol=1e-12)


def test_untargeted_goes_to_the_nearest_boundary_of_the_linearised_model(exact):
    """One step from the clean image: the plane is that of the class to which the way within the box is shortest."""
    model, batch = exact
    for threat in BALLS:
        attack = FAB(threat, targeted=False)
        with searching(model, batch, BALLS[0]) as views:
            excess, w = attack._plane(views, batch.x)
        jacobian = torch.func.vmap(torch.func.jacrev(lambda x: model(x[None])[0]))(batch.x).flatten(2).detach()
        z = model(batch.x).detach()
        for i, y in enumerate(batch.y.tolist()):
            planes = [(z[i, k] - z[i, y], jacobian[i, k] - jacobian[i, y]) for k in range(4) if k != y]
            ways = [to_hyperplane(batch.x[i].flatten()[None], w_k[None], f_k[None], threat.norm) for f_k, w_k in planes]
            f, normal = planes[min(range(3), key=lambda k: float(length(ways[k], threat.norm)))]
            assert torch.allclose(excess[i], f)
            assert torch.allclose(w[i], normal)


@pytest.mark.parametrize("threat", BALLS, ids=str)
def test_a_point_on_the_boundary_does_not_stay_there(threat):
    """There the way to the boundary is 0, and so is the pull towards the clean image: in float32 nothing would move."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(8, 2, bias=False))
    with torch.no_grad():
        model[1].weight.copy_(torch.tensor([[0.5], [1.0]]) * torch.ones(8))
        model[1].weight[1, 4:] = 0  # z_1 - z_0 = (sum of the first four - sum of the others) / 2
    x = torch.tensor([0.75] * 4 + [0.25] * 4).reshape(1, 1, 2, 4)
    middle = torch.full_like(x, 0.5)
    attack = FAB(threat, steps=6, targets=1)
    with searching(model, Batch(x, torch.tensor([1])), BALLS[0]) as views:
        assert views.at(middle).adv.diff().item() == 0
        found = attack._search(views, middle, None)
    assert found.value.item() > -1.05 * {"linf": 0.25, "l2": 0.25 * 8**0.5, "l1": 2.0}[threat.norm]


# --- laws


@pytest.mark.parametrize("threat", BALLS, ids=str)
@pytest.mark.parametrize("targeted", [True, False])
def test_until_broken_breaks_the_same_samples(exact, threat, targeted):
    model, batch = exact
    full = FAB(threat, steps=12, targets=3, targeted=targeted)(model, batch)
    soon = FAB(threat, steps=12, targets=3, targeted=targeted, until_broken=True)(model, batch)
    broken, early = (wrong(model, batch, x) & (distances(threat, batch, x) <= threat.eps) for x in (full, soon))
    assert torch.equal(broken, early)
    assert 3 < broken.sum() < 21
    assert (distances(threat, batch, full) <= distances(threat, batch, soon) + 1e-12).all()
    assert torch.allclose(full[~broken], soon[~broken])


@pytest.mark.parametrize("until_broken", [False, True])
def test_a_result_belongs_to_its_sample(exact, monkeypatch, until_broken):
    """Neither order, nor batch size, nor how many targets and restarts share a pass matter (T15)."""
    model, batch = exact
    attack = FAB(BALLS[1], steps=8, targets=3, restarts=2, until_broken=until_broken)
    whole = attack(model, batch)
    order = torch.randperm(len(batch), generator=torch.Generator().manual_seed(0))
    assert torch.allclose(attack(model, batch.take(order)), whole[order], atol=1e-9)
    parts = [attack(model, batch.take(part)) for part in torch.arange(len(batch)).split(5)]
    assert torch.allclose(torch.cat(parts), whole, atol=1e-9)
    for rows in (1, 10**6):
        monkeypatch.setattr("unmoved.attacks.rounds.ROWS", rows)
        assert torch.allclose(attack(model, batch), whole, atol=1e-9)


@pytest.mark.parametrize("more", ["steps", "restarts", "targets"])
def test_more_effort_never_helps_the_defender(exact, more):
    """T14, T16."""
    model, batch = exact
    last = None
    for value in (1, 2, 3):
        x_adv = FAB(BALLS[0], **{"steps": 4, "targets": 2, more: value})(model, batch)
        lost = wrong(model, batch, x_adv)
        away = torch.where(lost, distances(BALLS[0], batch, x_adv), torch.inf)
        assert last is None or (away <= last + 1e-12).all()
        last = away
    assert last.isfinite().all()


def test_restarts_start_half_an_eps_away_and_the_first_at_the_clean_image(exact):
    _, batch = exact
    middle = Batch(torch.full_like(batch.x, 0.5), batch.y, batch.index)
    for threat in BALLS:
        attack = FAB(threat, restarts=2)
        assert torch.equal(attack._start(middle, Round(0, 3)), middle.x)
        starts = [attack._start(middle, each) for each in (Round(1, 0), Round(2, 0), Round(1, 1))]
        for start in starts:
            assert torch.allclose(distances(threat, middle, start), torch.tensor(threat.eps / 2, dtype=torch.float64))
        assert not torch.equal(starts[0], starts[1])
        assert not torch.equal(starts[0], starts[2])


def test_finds_nothing_returns_the_clean_image(exact):
    _, batch = exact
    classes = int(batch.y.max()) + 1
    deaf = nn.Sequential(nn.Flatten(), nn.Linear(64, classes)).double()
    with torch.no_grad():
        deaf[1].weight.zero_()
        deaf[1].bias.copy_(torch.eye(classes)[0])
    for targeted in (True, False):
        x_adv = FAB(BALLS[1], steps=3, restarts=2, targeted=targeted)(deaf, batch)
        assert torch.equal(x_adv, batch.x)
    empty = batch.take(torch.arange(0))
    assert len(FAB(BALLS[0])(deaf, empty)) == 0


def test_small_gradients_are_gradients(trained):
    """A model whose logits are scaled by 1e-9 has the same boundary."""
    model, batch = trained
    batch = batch.take(torch.arange(16))

    class Scaled(nn.Module):
        def forward(self, x):
            return 1e-9 * model(x)

    for threat in BALLS:
        plain, faint = (FAB(threat, steps=10, targets=1)(each, batch) for each in (model, Scaled()))
        assert torch.allclose(distances(threat, batch, plain), distances(threat, batch, faint), rtol=0.05)


# --- manners


def test_rows_that_are_done_are_not_computed(exact):
    model, batch = exact
    sizes = []
    handle = model.register_forward_hook(lambda module, inputs, out: sizes.append(len(inputs[0])))
    FAB(BALLS[0], steps=5, targets=3)(model, batch)
    # The clean logits once; then a gradient pass and a check a step: 22 right samples, 3 targets in one pass. At the
    # end the proposals are judged a little further out.
    assert sizes == [24] + [66] * 10 + [22]
    sizes.clear()
    FAB(ThreatModel("linf", 0.3), steps=20, targets=1, until_broken=True)(model, batch)
    handle.remove()
    assert sizes[1:-1] == sorted(sizes[1:-1], reverse=True)
    assert len(sizes) < 20
    assert sizes[1] == 22
    assert sizes[-2:] == [1, 22]


def test_leaves_the_model_as_it_was(trained):
    """T1 to T6; the exam goes further."""
    model, batch = trained
    model = copy.deepcopy(model).train()
    model[1].eval()
    model[0].weight.grad = torch.ones_like(model[0].weight)
    batch = batch.take(torch.arange(8))
    before, random_state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    x_adv = FAB(BALLS[0], steps=3, restarts=2, targets=2)(model, batch)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert [module.training for module in model.modules()] == [True, True, False, True, True, True]
    assert (model[0].weight.grad == 1).all()
    assert model[4].weight.grad is None
    assert not x_adv.requires_grad
    for guard in (torch.no_grad, torch.inference_mode):
        with guard():
            assert torch.equal(FAB(BALLS[0], steps=3, restarts=2, targets=2)(model, batch), x_adv)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(FAB(BALLS[0], steps=3, restarts=2, targets=2)(model, batch), x_adv)


def test_refuses_a_model_without_a_gradient(trained):
    model, batch = trained

    class Cut(nn.Module):
        def forward(self, x):
            return model(x.detach())

    class Frozen(nn.Module):
        def forward(self, x):
            with torch.no_grad():
                return model(x)

    for each in (Cut(), Frozen()):
        with pytest.raises(UnmovedError, match="differentiable in the image"):
            FAB(BALLS[0])(each, batch)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 0}, "FAB.steps: expected a whole number >= 1, came 0"),
        ({"restarts": 0}, "FAB.restarts"),
        ({"targets": 0}, "FAB.targets"),
        ({"alpha_max": 1.5}, "FAB.alpha_max"),
        ({"beta": -0.1}, "FAB.beta"),
        ({"eta": 0.9}, "FAB.eta"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(UnmovedError, match=message):
        FAB(BALLS[0], **settings)
