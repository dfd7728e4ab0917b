"""Attacks and the box of valid images: optima of linear models within it, and results that scale with the bounds."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

from unmoved.attacks import APGD, CW, FAB, FGSM, FMN, IAAT, PGD, SPSA, DeepFool, HopSkipJump, Quick, Square
from unmoved.attacks.odi import DiversifiedPGD
from unmoved.core.batch import Batch
from unmoved.core.threat import ThreatModel
from unmoved.terms import Margin

NORMS = ("linf", "l2", "l1")
BOUNDS = ((0.0, 1.0), (-2.1, 2.6), (0.0, 255.0))
# Small, where the ball cuts the box, and larger than the box; as a share of its width.
SIZES = {"linf": (0.01, 0.3, 1.0), "l2": (0.05, 1.5, 20.0), "l1": (0.05, 3.0, 12.0, 80.0)}


class Score(nn.Module):
    """Two logits: 0, and a score that is linear in the image."""

    def __init__(self, weight):
        super().__init__()
        self.weight = nn.Buffer(weight)

    def forward(self, x):
        score = x.flatten(1) @ self.weight[:, None]
        return torch.cat([torch.zeros_like(score), score], dim=1)


def linear(bounds, *, d=36, n=24, at_edge=0.6):
    """A model, a batch most of whose pixels are at an edge of the box, and the direction (n, d) that breaks it."""
    draw = torch.Generator().manual_seed(4)
    low, high = bounds
    weight = torch.randn(d, generator=draw, dtype=torch.float64)
    x = torch.rand(n, d, generator=draw, dtype=torch.float64)
    x = torch.where(torch.rand(n, d, generator=draw) < at_edge, x.round(), x)
    y = ((x @ weight) > 0).long()
    x = low + (high - low) * x
    direction = weight / (high - low) * torch.where(y == 1, -1.0, 1.0)[:, None]
    return Score(weight / (high - low)), Batch(x.reshape(n, 1, 6, -1), y), direction


def highest_rise(x, direction, norm, eps, bounds):
    """max <direction, d> with ||d|| <= eps and x + d in the box, one sample after another, (n,)."""
    low, high = bounds
    room, size = torch.where(direction > 0, high - x, x - low), direction.abs()
    if norm == "linf":
        return (size * room.clamp_max(eps)).sum(1)
    if norm == "l2":  # clip(t direction), t by bisection
        under, over = torch.zeros(len(x), 1, dtype=x.dtype), room.amax() / size.amin() * torch.ones_like(x[:, :1])
        for _ in range(300):
            t = (under + over) / 2
            fits = torch.minimum(t * size, room).norm(dim=1, keepdim=True) <= eps
            under, over = torch.where(fits, t, under), torch.where(fits, over, t)
        return (size * torch.minimum(under * size, room)).sum(1)
    rises = []  # a fractional knapsack
    for one_size, one_room in zip(size.tolist(), room.tolist(), strict=True):
        left, rise = eps, 0.0
        for slope, space in sorted(zip(one_size, one_room, strict=True), reverse=True):
            rise, left = rise + slope * min(left, space), left - min(left, space)
        rises.append(rise)
    return torch.tensor(rises, dtype=x.dtype)


ASCENTS = [
    ("fgsm", lambda t: FGSM(t, Margin()), 0.999, 0.999),
    ("pgd", lambda t: PGD(t, Margin(), steps=20), 0.99, 0.95),
    ("pgd-none", lambda t: PGD(t, Margin(), steps=20, start="none"), 0.999, 0.999),
    ("apgd", lambda t: APGD(t, Margin(), steps=50), 0.99, 0.98),
    ("iaat", lambda t: IAAT(t, Margin(), steps=20), 0.98, 0.95),
]


@pytest.mark.parametrize("bounds", BOUNDS, ids=str)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize(("make", "median", "worst"), [a[1:] for a in ASCENTS], ids=[a[0] for a in ASCENTS])
def test_ascent_reaches_the_optimum_of_a_linear_model_in_the_box(make, median, worst, norm, bounds):
    width = bounds[1] - bounds[0]
    model, batch, direction = linear(bounds)
    x = batch.x.flatten(1)
    for share in SIZES[norm]:
        threat = ThreatModel(norm, share * width, bounds)
        x_adv = make(threat)(model, batch)
        threat.check(x_adv, batch.x)
        best = highest_rise(x, direction, norm, threat.radius, bounds)
        reached = ((x_adv.flatten(1) - x) * direction).sum(1) / best
        assert reached.max() <= 1 + 1e-5
        assert reached.median() >= median, (share, reached.median())
        assert reached.min() >= worst, (share, reached.min())


def test_spsa_moves_pixels_that_can_move():
    """The largest gradient is at a pixel that stands at the edge of the box; the others suffice."""
    x = torch.tensor([0.0, 0.5, 0.5, 0.5], dtype=torch.float64).reshape(1, 1, 2, 2)
    model = nn.Sequential(Score(torch.tensor([-3.0, 1.0, 1.0, 1.0], dtype=torch.float64)))
    model.register_forward_hook(lambda module, args, z: z - torch.tensor([0.0, 1.7], dtype=torch.float64))
    threat = ThreatModel("l1", 0.3)
    for scale in (1.0, 1e-10, 1e10):
        faint = Scaled(model, scale, (0.0, 1.0))
        x_adv = SPSA(threat, steps=20)(faint, Batch(x, torch.tensor([0])))
        assert faint(x_adv).argmax(1).item() == 1, scale


class Scaled(nn.Module):
    """The model on images in other bounds, its logits times ``scale``."""

    def __init__(self, model, scale, bounds):
        super().__init__()
        self.model, self.scale, self.bounds = model, scale, bounds

    def forward(self, x):
        low, high = self.bounds
        return self.scale * self.model((x - low) / (high - low))


EVERY = [
    ("fgsm", FGSM, NORMS),
    ("pgd", lambda t: PGD(t, steps=5), NORMS),
    ("pgd-gaussian", lambda t: PGD(t, steps=3, start="gaussian"), NORMS),
    ("apgd", lambda t: APGD(t, steps=20), NORMS),
    ("apgd-large-first", lambda t: APGD(t, steps=20, large_first=True), ("l1",)),
    ("diversified", lambda t: DiversifiedPGD(t, steps=10), NORMS),
    ("iaat", lambda t: IAAT(t, steps=5), NORMS),
    ("spsa", lambda t: SPSA(t, steps=5, samples=32), NORMS),
    ("square", lambda t: Square(t, queries=40), NORMS),
    ("fmn", lambda t: FMN(t, steps=20), NORMS),
    ("fab", lambda t: FAB(t, steps=10, restarts=2), NORMS),
    ("fab-untargeted", lambda t: FAB(t, steps=5, targeted=False), NORMS),
    ("deepfool", DeepFool, ("linf", "l2")),
    ("cw", lambda t: CW(t, steps=30, search_steps=3, initial_const=0.01), ("l2",)),
    ("hop-skip-jump", lambda t: HopSkipJump(t, queries=400), ("linf", "l2")),
    ("quick", Quick, NORMS),
]
CASES = [pytest.param(make, norm, id=f"{name}-{norm}") for name, make, norms in EVERY for norm in norms]


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(36, 16), nn.Tanh(), nn.Linear(16, 4)).double().eval()
    x = torch.rand(10, 1, 6, 6, dtype=torch.float64)
    x[:4] = x[:4].round()
    with torch.no_grad():
        y = model(x).argmax(1)
    y[-1] = (y[-1] + 1) % 4
    return model, Batch(x, y)


@pytest.mark.parametrize("bounds", [(-2.0, 6.0), (0.0, 256.0)], ids=str)
@pytest.mark.parametrize(("make", "norm"), CASES)
def test_images_in_other_bounds_are_attacked_alike(make, norm, bounds, network):
    """Widths are powers of 2, and numbers double: rounding is what is left to differ."""
    model, batch = network
    low, high = bounds
    eps = {"linf": 0.1, "l2": 0.5, "l1": 1.5}[norm]
    plain = make(ThreatModel(norm, eps))(model, batch)
    moved = dataclasses.replace(batch, x=low + (high - low) * batch.x)
    x_adv = make(ThreatModel(norm, eps * (high - low), bounds))(Scaled(model, 1.0, bounds), moved)
    assert ((plain != batch.x).flatten(1).any(1)).any()
    assert torch.allclose((x_adv - low) / (high - low), plain, atol=1e-3)


@pytest.mark.parametrize("scale", [1e-10, 1e10])
@pytest.mark.parametrize(("make", "norm"), [c for c in CASES if not c.id.startswith("quick")])
def test_the_scale_of_the_logits_hides_no_success(make, norm, scale, network):
    """Attacks on the cross-entropy get the margin as their loss: a softmax of such logits is flat, or saturated."""
    model, batch = network
    eps = {"linf": 0.3, "l2": 2.0, "l1": 8.0}[norm]
    attack = make(ThreatModel(norm, eps))
    if isinstance(attack, IAAT):
        attack = IAAT(attack.threat, Margin(), steps=5)
    elif hasattr(attack, "loss"):
        attack = dataclasses.replace(attack, loss=Margin())
    counts = []
    with torch.no_grad():
        for factor in (1.0, scale):
            scaled = Scaled(model, factor, (0.0, 1.0))
            counts.append(int((model(attack(scaled, batch)).argmax(1) != batch.y).sum()))
    assert counts[0] > 1
    assert counts[1] >= counts[0]


MEETS = [
    ("deepfool", DeepFool, ("linf", "l2")),
    ("fmn", lambda t: FMN(t, steps=20), NORMS),
    ("fab", lambda t: FAB(t, steps=10), NORMS),
    ("cw", lambda t: CW(t, steps=40, search_steps=4, initial_const=0.01), ("l2",)),
    ("hop-skip-jump", lambda t: HopSkipJump(t, queries=300), ("linf", "l2")),
]


@pytest.mark.parametrize("shift", [0.0, 1e-6, 1e-4])
@pytest.mark.parametrize(
    ("make", "norm"), [pytest.param(make, norm, id=f"{n}-{norm}") for n, make, norms in MEETS for norm in norms]
)
def test_what_is_proposed_at_a_boundary_does_not_hang_on_the_batch_size(make, norm, shift):
    """Samples that are close to their boundary to begin with, judged in one batch, by threes, alone and in float64."""
    draw = torch.Generator().manual_seed(1)
    weight = torch.randn(10, 192, generator=draw) / 8
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 10))
    with torch.no_grad():
        model[1].weight.copy_(weight)
        model[1].bias.copy_(-0.5 * weight.sum(1))
    model.requires_grad_(False)
    x = torch.rand(17, 3, 8, 8, generator=draw)
    top = model(x).topk(2, dim=1)
    apart = weight[top.indices[:, 0]] - weight[top.indices[:, 1]]
    gap = (top.values[:, 0] - top.values[:, 1]) / apart.square().sum(1)
    x = (x - (gap * (1 - shift))[:, None, None, None] * apart.reshape(x.shape)).clamp(0, 1)
    batch = Batch(x, top.indices[:, 0])
    x_adv = make(ThreatModel(norm, 0.1))(model, batch)
    assert (x_adv != x).flatten(1).any(1).sum() > 10
    verdicts = [torch.cat([model(part).argmax(1) for part in x_adv.split(size)]) != batch.y for size in (17, 3, 1)]
    wide = nn.Sequential(nn.Flatten(), nn.Linear(192, 10)).double()
    wide.load_state_dict(model.state_dict())
    verdicts.append(wide(x_adv.double()).argmax(1) != batch.y)
    assert torch.stack(verdicts).all(0).equal(torch.stack(verdicts).any(0))
    assert verdicts[0].sum() > 10
