"""Square against a plain loop over samples, closed forms, and the laws of random search."""

from __future__ import annotations

import math

import pytest
import torch
from scipy import stats
from torch import nn

from unmoved.attacks import PGD
from unmoved.attacks.square import BLOCK, Square
from unmoved.attacks.square_proposals import Draws, Flips, _both_ways, _hump, mosaic, stripes
from unmoved.core import noise
from unmoved.core.batch import Batch
from unmoved.core.errors import UnmovedError
from unmoved.core.threat import NORMS, ThreatModel
from unmoved.core.views import Views
from unmoved.terms import CE, Margin
from unmoved.testing import check_attack

BALLS = {"linf": ThreatModel("linf", 0.13), "l2": ThreatModel("l2", 0.9), "l1": ThreatModel("l1", 4.0)}
ALL_NORMS = pytest.mark.parametrize("norm", NORMS)


def loss_at(model, batch, x_adv, term=Margin()):  # noqa: B008
    with torch.no_grad():
        return term(Views(model, batch, x_adv))


def wrong(model, batch, x_adv):
    with torch.no_grad():
        return model(x_adv).argmax(1) != batch.y


def double(trained, count):
    model, batch = trained
    copy = nn.Sequential(*[type(m)(*args) for m, args in zip(model, [(1, 8, 3), (8,), (), (), (288, 4)], strict=True)])
    copy.load_state_dict(model.state_dict())
    return copy.double().eval(), Batch(batch.x[:count].double(), batch.y[:count])


# --- the algorithm, written out for one image


def tile_by_hand(side, order, turned):
    """Section 3.4 of the paper: rectangles that grow by a pixel each way, weighing 1 / n^2 (1 / n^4 in l1)."""
    halves = []
    for height in (side // 2, side - side // 2):
        hump = torch.zeros(height, side, dtype=torch.float64)
        for n in range(1, max(height, side) // 2 + 2):
            for i in range(height):
                for j in range(side):
                    if abs(i - height // 2) < n and abs(j - side // 2) < n:
                        hump[i, j] += n ** (-2.0 if order == 2 else -4.0)
        halves.append(hump / max(hump.norm(p=order).item(), 1e-300))
    tile = torch.cat([halves[0], -halves[1]])
    tile = tile / tile.norm(p=order)
    return tile.T if turned else tile


def by_hand(model, batch, attack):
    """One image, one query at a time, windows as slices."""
    threat, eps, x = attack.threat, attack.threat.radius, batch.x
    (_, channels, height, width), order = x.shape, 2 if threat.norm == "l2" else 1
    linf = threat.norm == "linf"
    best = (stripes if linf else mosaic)(threat, batch, attack.seed, 0)
    top = loss_at(model, batch, best).item()
    asked = 1
    for first, length, side in attack._blocks(height, width):
        draws = Draws(side, length, attack.seed, 1 + first).uniform(batch, channels + (2 if linf else 5))[:, 0]
        for draw in draws:
            if wrong(model, batch, best).item():
                return best, asked
            i, j = int(draw[0] * (height - side + 1)), int(draw[1] * (width - side + 1))
            new = best.clone()
            if linf:
                for c in range(channels):
                    move = eps if draw[2 + c] < 0.5 else -eps
                    new[0, c, i : i + side, j : j + side] = x[0, c, i : i + side, j : j + side] + move
                new = new.clamp(0, 1)
            else:
                m, n = int(draw[2] * (height - side + 1)), int(draw[3] * (width - side + 1))
                delta = best - x
                length_before = delta.norm(p=order).item()
                mask = torch.zeros_like(x)
                mask[:, :, i : i + side, j : j + side] = 1
                mask[:, :, m : m + side, n : n + side] = 1
                emptied = delta.clone()
                emptied[:, :, m : m + side, n : n + side] = 0
                for c in range(channels):
                    window = delta[0, c, i : i + side, j : j + side]
                    tile = tile_by_hand(side, order, draw[4] < 0.5) * (1 if draw[5 + c] < 0.5 else -1)
                    mixed = tile + window / (window.norm(p=order) + 1e-12)
                    held = (delta * mask)[0, c].norm(p=order).item()
                    if order == 2:
                        mass = math.sqrt(max(eps**2 - length_before**2, 0) / channels + held**2)
                    else:
                        mass = max(eps - length_before, 0) + held * channels
                    emptied[0, c, i : i + side, j : j + side] = mixed / mixed.norm(p=order) * mass
                scaled = (x + emptied * eps / emptied.norm()).clamp(0, 1)
                new = scaled if order == 2 else threat.project(x + emptied, x)
            asked += 1
            value = loss_at(model, batch, new).item()
            if value > top + 1e-14 or wrong(model, batch, new).item():
                best, top = new, value
    return best, asked


@ALL_NORMS
def test_is_the_textbook_loop(trained, norm):
    model, batch = double(trained, 6)
    attack = Square(BALLS[norm], queries=70)
    ours = attack(model, batch)
    for k in range(len(batch)):
        alone = batch.take(torch.tensor([k]))
        assert torch.allclose(by_hand(model, alone, attack)[0], ours[k : k + 1], atol=1e-9), k


@ALL_NORMS
def test_is_the_textbook_loop_on_colours_and_oblong_images(norm):
    draw = torch.Generator().manual_seed(0)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(4 * 9 * 5, 5)).double()
    x = torch.rand(3, 3, 11, 7, generator=draw, dtype=torch.float64)
    batch = Batch(x, model(x).argmax(1))
    attack = Square(ThreatModel(norm, {"linf": 0.01, "l2": 0.05, "l1": 0.2}[norm]), queries=40)
    ours = attack(model, batch)
    for k in range(len(batch)):
        assert torch.allclose(by_hand(model, batch.take(torch.tensor([k])), attack)[0], ours[k : k + 1], atol=1e-9)


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("side", [1, 2, 3, 5, 8, 13])
def test_tiles_are_the_papers(side, order):
    upright, turned = _both_ways(side, order)
    assert torch.allclose(upright, tile_by_hand(side, order, False))
    assert torch.allclose(turned, tile_by_hand(side, order, True))
    assert upright.norm(p=order).item() == pytest.approx(1)
    assert (upright[: side // 2] > 0).all()
    assert (upright[side // 2 :] < 0).all()
    assert _hump(0, 3, order).shape == (0, 3)


@pytest.mark.parametrize(
    ("norm", "sides"),
    [("linf", [25, 18, 13, 9, 6, 4, 3, 2, 2, 1]), ("l2", [25, 19, 13, 9, 7, 5, 3, 3, 3, 3])],
)
def test_the_schedule_is_autoattacks(norm, sides):
    """28 x 28, p = 0.8: the share is halved after iterations 10, 50, 200, 500, 1000, 2000, 4000, 6000 and 8000."""
    attack = Square(ThreatModel(norm, 0.3), queries=10_001)
    blocks = list(attack._blocks(28, 28))
    per_iteration = [side for _, length, side in blocks for _ in range(length)]
    assert [first for first, _, _ in blocks] == [sum(b[1] for b in blocks[:k]) for k in range(len(blocks))]
    assert max(length for _, length, _ in blocks) == BLOCK
    assert len(per_iteration) == 10_000
    ends = [10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000]
    assert [per_iteration[k] for k in ends] == sides[:-1]
    assert [per_iteration[k + 1] for k in ends] == sides[1:]
    short = Square(ThreatModel(norm, 0.3), queries=1000, rescale_schedule=True)
    sides_of_short = [side for _, length, side in short._blocks(28, 28) for _ in range(length)]
    assert len(sides_of_short) == 999
    assert [sides_of_short[k] for k in (1, 5, 20, 50, 100, 200, 400, 600, 800)] == sides[:-1]
    assert [sides_of_short[k] for k in (2, 6, 21, 51, 101, 201, 401, 601, 801)] == sides[1:]


def test_windows_fall_everywhere_alike():
    """Each place is equally likely, the last row and column included, and each sign."""
    batch = Batch(torch.full((4000, 1, 6, 7), 0.5), torch.zeros(4000, dtype=torch.long))
    moves = Flips(BALLS["linf"], batch, Draws(side=3, length=2, seed=0, stream=1))
    rows = torch.arange(4000)
    which, x_new = moves(batch.x.clone(), rows, torch.ones_like(rows))
    assert torch.equal(which, rows)
    changed = (x_new != batch.x)[:, 0]
    assert torch.equal(changed.sum((1, 2)), torch.full((4000,), 9))
    place = changed.flatten(1).float().argmax(1)
    places = [7 * i + j for i in range(4) for j in range(5)]
    counts = torch.bincount(place, minlength=42)
    assert counts[places].sum() == 4000
    assert stats.chisquare(counts[places].numpy()).pvalue > 1e-4
    assert stats.binomtest(int((x_new.amax((1, 2, 3)) > 0.5).sum()), 4000).pvalue > 1e-4


def test_the_linf_start_has_vertical_stripes():
    batch = Batch(torch.full((200, 3, 5, 6), 0.5), torch.zeros(200, dtype=torch.long))
    delta = stripes(BALLS["linf"], batch, 0, 0) - 0.5
    assert torch.allclose(delta.abs(), torch.tensor(0.13))
    assert torch.equal(delta, delta[:, :, :1].expand_as(delta))
    assert stats.binomtest(int((delta[:, :, 0] > 0).sum()), 200 * 3 * 6).pvalue > 1e-4


@pytest.mark.parametrize("size", [(28, 28), (8, 8), (3, 4), (33, 20)])
def test_the_other_starts_fill_the_ball(size):
    batch = Batch(torch.full((5, 3, *size), 0.5), torch.zeros(5, dtype=torch.long))
    for norm, eps in (("l2", 0.4), ("l1", 0.4)):
        threat = ThreatModel(norm, eps)
        start = mosaic(threat, batch, 0, 0)
        assert torch.allclose(threat.distance(start, batch.x), torch.full((5,), eps, dtype=torch.float64), atol=1e-5)
    tiles = (mosaic(ThreatModel("l2", 0.4), batch, 0, 0) - batch.x).abs() > 0
    assert tiles.float().mean() > 0.6


# --- the laws


@ALL_NORMS
def test_stays_in_the_ball_and_the_box(norm):
    draw = torch.Generator().manual_seed(0)
    x = torch.rand(12, 3, 9, 9, generator=draw)
    x[:6] = x[:6].round()  # every pixel at the edge of the box
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(243, 30), nn.ReLU(), nn.Linear(30, 4))
    batch = Batch(x, torch.randint(4, (12,), generator=draw))
    for eps in (0.01, 0.3, 1.0):
        threat = ThreatModel(norm, eps)
        x_adv = Square(threat, queries=40, restarts=2)(model, batch)
        threat.check(x_adv, x)
        assert x_adv.dtype == x.dtype
        assert not torch.equal(x_adv, x)


@ALL_NORMS
def test_the_loss_never_falls_and_success_is_final(trained, norm):
    """T14, T16: per sample, along the queries; a sample is left alone from its first success on."""
    model, batch = trained
    before = None
    for queries in (1, 2, 12, 40, 120):
        x_adv = Square(BALLS[norm], queries=queries)(model, batch)
        lost, value = wrong(model, batch, x_adv), loss_at(model, batch, x_adv)
        if before is not None:
            x_before, lost_before, value_before = before
            assert torch.equal(x_adv[lost_before], x_before[lost_before])
            assert (value >= value_before - 1e-5)[~lost_before].all()
            assert (value > value_before)[~lost_before].float().mean() > 0.05
        before = x_adv, lost, value
    assert 0.1 < lost.float().mean() < 0.995
    more = Square(BALLS[norm], queries=120, restarts=3)(model, batch)
    assert torch.equal(more[lost], x_adv[lost])
    assert (loss_at(model, batch, more) >= value - 1e-5)[~lost].all()


@ALL_NORMS
def test_no_sample_is_asked_more_than_queries_times(trained, norm):
    model, batch = double(trained, 16)
    asked = []
    model.register_forward_pre_hook(lambda m, inputs: asked.append(inputs[0].clone()))
    whole = Square(BALLS[norm], queries=60)(model, batch)
    total = sum(map(len, asked))
    lost = wrong(model, batch, whole)
    assert 0 < lost.sum() < len(batch)
    for k in range(len(batch)):
        alone = batch.take(torch.tensor([k]))
        asked.clear()
        x_adv = Square(BALLS[norm], queries=60)(model, alone)
        seen = torch.cat(asked)
        total -= len(seen)
        same = Batch(seen, alone.y.expand(len(seen)))
        right, values = ~wrong(model, same, seen), loss_at(model, same, seen)
        if lost[k]:  # the first success is the last question and the answer
            assert right[:-1].all()
            assert torch.equal(seen[-1:], x_adv)
        else:
            assert right.all()
            assert torch.equal(seen[values.argmax()], x_adv[0])
        assert len(seen) <= 60
        assert norm == "linf" or lost[k] or len(seen) == 60
        if norm == "linf":  # what changes nothing is not asked: what it would answer is known
            best = torch.cummax(values, 0).indices
            assert all(not torch.equal(seen[i], seen[best[i - 1]]) for i in range(1, len(seen)))
    assert total == 0


def test_one_query_is_the_start(trained):
    model, batch = trained
    assert torch.equal(Square(BALLS["linf"], queries=1)(model, batch), stripes(BALLS["linf"], batch, 0, 0))


@ALL_NORMS
def test_a_sample_does_not_know_its_batch(trained, norm):  # T15
    model, batch = double(trained, 20)
    attack = Square(BALLS[norm], queries=90)
    whole = attack(model, batch)
    order = torch.arange(19, -1, -1)
    assert torch.allclose(attack(model, batch.take(order)), whole[order], atol=1e-12)
    some = torch.tensor([3, 17, 8])
    assert torch.allclose(attack(model, batch.take(some)), whole[some], atol=1e-12)
    later = Batch(batch.x, batch.y, batch.index, step=1)
    assert not torch.equal(attack(model, later), whole)
    assert not torch.equal(Square(BALLS[norm], queries=90, seed=1)(model, batch), whole)


@ALL_NORMS
def test_sits_the_exam(norm):
    check_attack(lambda threat: Square(threat, queries=25, restarts=2), norm=norm, maximises=False)


def test_on_a_linear_model_it_ends_at_the_optimum():
    """A linear margin has no local optimum for single pixels, so linf search ends at x - eps sign(w), exactly."""
    draw = torch.Generator().manual_seed(3)
    weight = torch.randn(36, generator=draw, dtype=torch.float64)
    model = nn.Sequential(nn.Flatten(), nn.Linear(36, 2)).double()
    with torch.no_grad():
        model[1].weight.copy_(torch.stack([-weight, weight]) / 2)
        model[1].bias.copy_(torch.tensor([-20.0, 20.0]))  # nothing can be misclassified
    x = torch.rand(8, 1, 6, 6, generator=draw, dtype=torch.float64)
    # Windows of one pixel from the first on: 72 moves, each tried by 900 queries but for one in e^12.
    x_adv = Square(BALLS["linf"], queries=900, p=0.02)(model, Batch(x, torch.ones(8, dtype=torch.long)))
    assert torch.equal(x_adv, (x - 0.13 * weight.sign().reshape(1, 6, 6)).clamp(0, 1))


@ALL_NORMS
def test_eps_zero_is_the_image_itself_and_asks_nothing(trained, norm):  # T16
    _, batch = trained
    x_adv = Square(ThreatModel(norm, 0.0), queries=5)(nn.Module(), batch)
    assert torch.equal(x_adv, batch.x)
    assert x_adv is not batch.x


class Rounding(nn.Module):
    """Hides the gradient: it is zero everywhere."""

    def forward(self, x):
        return torch.round(x * 20) / 20


def test_a_hidden_gradient_does_not_stop_it(trained):
    model, batch = trained
    masked = nn.Sequential(Rounding(), model)
    rest = batch.take(~wrong(masked, batch, batch.x))
    gradient = wrong(masked, rest, PGD(BALLS["linf"], steps=20, start="none")(masked, rest))
    search = wrong(masked, rest, Square(BALLS["linf"], queries=200)(masked, rest))
    assert gradient.sum() == 0
    assert search.float().mean() > 0.3


def test_any_term_of_the_adversarial_view_is_its_loss(trained):
    model, batch = trained
    few = batch.take(torch.arange(40))
    start = loss_at(model, few, Square(BALLS["l2"], queries=1)(model, few), CE())
    after = loss_at(model, few, Square(BALLS["l2"], queries=60, loss=CE())(model, few), CE())
    assert (after >= start - 1e-6).all()
    assert after.mean() > start.mean() + 0.3


def test_a_misclassified_proposal_is_kept_whatever_the_loss_says(trained):
    model, batch = trained

    def blind(views):
        return torch.zeros_like(views.adv[:, 0])

    wide = ThreatModel("linf", 0.25)
    x_adv = Square(wide, queries=40, loss=blind)(model, batch)
    lost, start = wrong(model, batch, x_adv), stripes(wide, batch, 0, 0)
    assert 0 < lost.sum() < len(batch)
    assert torch.equal(x_adv[~lost], start[~lost])
    assert (lost & ~wrong(model, batch, start)).sum() > 10


def test_reduced_precision_and_channels_last_search_alike(trained):
    model, batch = trained
    with torch.autocast("cpu", dtype=torch.bfloat16):
        x_adv = Square(BALLS["linf"], queries=40)(model, batch)
    assert x_adv.dtype == torch.float32
    exact = Square(BALLS["linf"], queries=40)(model, batch)
    assert abs(wrong(model, batch, x_adv).sum() - wrong(model, batch, exact).sum()) < 0.1 * len(batch)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3)).double()
    x = torch.rand(5, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    few = Batch(x, network(x).argmax(1))
    layouts = []
    network.register_forward_hook(lambda m, i, o: layouts.append(i[0].is_contiguous(memory_format=torch.channels_last)))
    plain = Square(BALLS["linf"], queries=20)(network, few)
    assert not any(layouts)
    layouts.clear()
    network.to(memory_format=torch.channels_last)
    assert torch.allclose(Square(BALLS["linf"], queries=20)(network, few), plain)
    assert all(layouts[1:])  # the first pass is the start's


def test_noise_is_drawn_in_blocks_that_do_not_depend_on_the_budget(trained):
    _, batch = trained
    long = Draws(3, 25, 0, 7).uniform(batch, 4)
    short = Draws(3, 10, 0, 7).uniform(batch, 4)
    assert long.shape == (25, len(batch), 4)
    assert torch.equal(long[:10], short)
    assert torch.equal(long[2, 5], noise.uniform(batch.index, (25, 4), seed=0, stream=7)[5, 2].double())


@pytest.mark.parametrize(
    "settings", [{"queries": 0}, {"p": 0.0}, {"p": 1.1}, {"restarts": 0}, {"queries": math.nan}], ids=str
)
def test_bad_settings(settings):
    with pytest.raises(UnmovedError, match=f"Square.{next(iter(settings))}: expected a (finite|whole) number"):
        Square(BALLS["linf"], **settings)


def test_needs_images():
    model = nn.Linear(4, 2)
    with pytest.raises(UnmovedError, match=r"expected images \(B, C, H, W\), came \(3, 4\)"):
        Square(BALLS["linf"])(model, Batch(torch.rand(3, 4), torch.zeros(3, dtype=torch.long)))
