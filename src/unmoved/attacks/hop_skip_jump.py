"""Attack by HopSkipJump, which uses only the predicted classes of the model."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from unmoved.attacks.call_signature import takes_images
from unmoved.attacks.gradients import crossed
from unmoved.attacks.hyperplanes import length
from unmoved.attacks.minimum_norm import Nearest, searching
from unmoved.core import noise
from unmoved.core.batch import Batch, Image, per_image
from unmoved.core.errors import UnmovedError, keep_field, require_seed, whole_field
from unmoved.core.protocols import QUERIES
from unmoved.core.threat import ThreatModel, require_threat
from unmoved.core.views import Views

# Approximate number of images in a forward pass; the result does not depend on it.
PASS = 1024
HALVINGS = 12
# Streams of noise: one for each direction; the starts use negative ones.
STRIDE = 1 << 20


@dataclass(frozen=True)
class HopSkipJump:
    """HopSkipJump (Chen, Jordan and Wainwright 2020, algorithm 2): a walk along the boundary by decisions alone.

    From a boundary point x_t the normal is estimated by ``n = mean_b (phi_b - mean phi) u_b``, phi_b = +1 where
    ``x_t + delta_t u_b`` is misclassified and -1 elsewhere, u_b random unit vectors, of which there are
    ``samples sqrt(t)``; ``delta_t = ||x_t - x|| / d``. The step ``||x_t - x|| / sqrt(t)`` along ``n / ||n||_2`` (l2)
    or ``sign(n)`` (linf), of that length within the box, is halved until it ends misclassified, and bisection leads
    back to the boundary: along the line to x in l2, by clipping to smaller and smaller linf balls.

    The first point is random noise, fine or coarse, grey or black and white, or a blend of it with x. The threat
    model's eps is not used: the nearest misclassified point is proposed, wherever it is, and the clean image where no
    start is found. A misclassified image is returned as it is.

    Args:
        threat: norm (linf or l2) and bounds.
        queries: decisions asked for each sample, at most (the paper reports 1000, 5000 and 25000).
        samples: directions of the first estimate (100 in the paper).
        starts: noise blends tried, at most (100 in the authors' code).
        seed: keys the noise.

    Raises:
        UnmovedError: norm l1, or a value outside its bounds.

    Deviations: the start (the authors try fine grey noise alone). The bisection takes 10 to 24 decisions, even
    if the exact rule asks for more. A last decision moves the result outwards, by a share of 1e-4 and beyond rounding.
    """

    threat: ThreatModel
    queries: int = 5000
    samples: int = 100
    starts: int = 40
    seed: int = 0

    kind = QUERIES
    minimum_norm = True

    def __post_init__(self) -> None:
        require_threat("HopSkipJump.threat", self.threat)
        whole_field(self, "HopSkipJump.queries", at_least=1)
        whole_field(self, "HopSkipJump.samples", at_least=1)
        whole_field(self, "HopSkipJump.starts", at_least=1)
        keep_field(self, "HopSkipJump.seed", require_seed)
        if self.threat.norm not in ("linf", "l2"):
            raise UnmovedError(f"HopSkipJump: expected norm linf or l2, came {self.threat.norm}; use FMN")

    @takes_images
    def __call__(self, model: nn.Module, batch: Batch) -> Image:
        with searching(model, batch, self.threat) as views, torch.no_grad():
            nearest = Nearest(views, self.threat)
            if len(nearest.open):
                self._search(nearest)
            return nearest.cleared(further_by=1e-4)

    def _search(self, nearest: Nearest) -> None:
        """Walk along the boundary, counting each decision; end a sample that has too few left for an iteration."""
        d = nearest.x[0].numel()
        bisections = min(max(math.ceil(math.log2(d) * (1.5 if self.threat.norm == "l2" else 2)), 10), 24)
        low, high = self.threat.bounds
        x_adv, used, has_start = self._start(nearest.views, tries=min(self.starts, self.queries - 2 - bisections))
        started = torch.nonzero(has_start).flatten()
        views, position, used = nearest.views.take(started), nearest.open[started], used[started] + bisections
        x_adv = self._to_boundary(views, x_adv[started], bisections)
        for t in itertools.count(1):
            nearest.offer(position, x_adv, torch.ones_like(used, dtype=torch.bool), views.x)
            count = int(self.samples * math.sqrt(t))
            go = torch.nonzero(used + count + HALVINGS + bisections < self.queries).flatten()
            if len(go) == 0:
                break
            views, position, x_adv, used = views.take(go), position[go], x_adv[go], used[go]
            away = length((x_adv - views.x).flatten(1), self.threat.norm)
            radius = away / d if t > 1 else torch.full_like(away, 0.1 * (high - low))
            normal = self._normal(views, x_adv, radius, count, t)
            x_adv, asked = self._step(views, x_adv, normal, away / math.sqrt(t))
            x_adv = self._to_boundary(views, x_adv, bisections)
            used = used + count + asked + bisections

    def _start(self, views: Views, tries: int) -> tuple[Image, Tensor, Tensor]:
        """Return misclassified blends, the number of decisions used, and which samples have a blend (n,)."""
        x_adv, has_start = views.x.clone(), torch.zeros_like(views.y, dtype=torch.bool)
        used, go = torch.ones_like(views.y), torch.arange(len(has_start), device=has_start.device)
        for attempt in range(tries):
            tried = self._blend(views.batch.take(go), attempt)
            wrong = _misclassified(views.take(go), tried)
            used[go] += 1
            x_adv[go[wrong]], has_start[go[wrong]] = tried[wrong], True
            go = go[~wrong]
            if len(go) == 0:
                break
        return x_adv, used, has_start

    def _blend(self, batch: Batch, attempt: int) -> Image:
        """Draw noise in blocks of 1, 2, 4 or 8 pixels by turns: grey, black and white, or half and half with x."""
        kind, shape, block = attempt // 4 % 3, tuple(batch.x.shape[1:]), 2 ** (attempt % 4)
        coarse = (*shape[:-2], *(-(-side // block) for side in shape[-2:])) if len(shape) == 3 else shape
        draw = noise.uniform(batch.index, coarse, seed=self.seed, step=batch.step, stream=-1 - attempt)
        if coarse != shape:
            draw = functional.interpolate(draw, scale_factor=block)[..., : shape[-2], : shape[-1]]
        low, high = self.threat.bounds
        noisy = low + (high - low) * (draw.round() if kind == 1 else draw).to(batch.x.dtype)
        return (batch.x + (0.5 if kind == 2 else 1.0) * (noisy - batch.x)).clamp(low, high)

    def _to_boundary(self, views: Views, x_adv: Image, bisections: int) -> Image:
        """Bisect; return the misclassified end of an interval across the boundary between x and x_adv."""
        x, size = views.x, length((x_adv - views.x).flatten(1), self.threat.norm)
        low, high = self.threat.bounds

        def at(share: Tensor) -> Image:
            if self.threat.norm == "l2":
                return (x + per_image(share, x) * (x_adv - x)).clamp(low, high)
            ball = per_image(share * size, x)
            return torch.minimum(torch.maximum(x_adv, x - ball), x + ball).clamp(low, high)

        inner, outer = torch.zeros_like(size), torch.ones_like(size)
        for _ in range(bisections):
            middle = (inner + outer) / 2
            wrong = _misclassified(views, at(middle))
            inner, outer = torch.where(wrong, inner, middle), torch.where(wrong, middle, outer)
        return torch.where(per_image(outer < 1, x), at(outer), x_adv)

    def _normal(self, views: Views, x_adv: Image, radius: Tensor, count: int, t: int) -> Tensor:
        """Estimate the direction into the misclassified side from ``count`` decisions around each point."""
        low, high = self.threat.bounds
        radii, shape, step = per_image(radius, x_adv), tuple(x_adv.shape[1:]), views.batch.step
        draw = noise.normal if self.threat.norm == "l2" else noise.uniform
        everyone = torch.arange(len(x_adv), device=x_adv.device)
        balance, directions, signed = torch.zeros_like(radius), torch.zeros_like(x_adv), torch.zeros_like(x_adv)
        for part in torch.arange(count).split(max(1, PASS // len(x_adv))):
            streams = [t * STRIDE + b for b in part.tolist()]
            u = torch.cat([draw(views.index, shape, seed=self.seed, step=step, stream=s) for s in streams])
            u = (u if self.threat.norm == "l2" else 2 * u - 1).to(x_adv.dtype)
            u = u / per_image(length(u.flatten(1), "l2"), u)
            many = (len(streams), *[1] * len(shape))
            around = (x_adv.repeat(many) + radii.repeat(many) * u).clamp(low, high)
            u = (around - x_adv.repeat(many)) / radii.repeat(many)
            phi = _misclassified(views.take(everyone.repeat(len(streams))), around).to(x_adv.dtype) * 2 - 1
            balance += phi.reshape(len(streams), -1).sum(dim=0)
            directions += u.reshape(len(streams), *x_adv.shape).sum(dim=0)
            signed += (per_image(phi, u) * u).reshape(len(streams), *x_adv.shape).sum(dim=0)
        mean = per_image(balance / count, x_adv)
        return torch.where(mean.abs() == 1, signed, signed - mean * directions)

    def _step(self, views: Views, x_adv: Image, normal: Tensor, size: Tensor) -> tuple[Image, Tensor]:
        """Halve a step until it ends misclassified; return that point, or x_adv, and the number of tries (n,)."""
        low, high = self.threat.bounds
        move, moved = self.threat.step(x_adv, normal, per_image(size, x_adv)), x_adv.clone()
        asked, go = torch.zeros_like(views.y), torch.arange(len(x_adv), device=x_adv.device)
        for halving in range(HALVINGS):
            tried = (x_adv[go] + move[go] / 2**halving).clamp(low, high)
            wrong = _misclassified(views.take(go), tried)
            asked[go] += 1
            moved[go[wrong]] = tried[wrong]
            go = go[~wrong]
            if len(go) == 0:
                break
        return moved, asked


def _misclassified(views: Views, x_adv: Image) -> Tensor:
    """Return whether the model misclassifies each image, (n,) bool; not if rounding could turn the decision."""
    return crossed(views.at(x_adv).adv, views.y)
