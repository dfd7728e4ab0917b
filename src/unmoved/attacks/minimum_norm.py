"""Keep the nearest misclassified image so far, in full precision, for attacks that seek the decision boundary."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from unmoved.attacks.gradients import attacking, crossed
from unmoved.attacks.hyperplanes import length
from unmoved.core.batch import Batch, Image, per_image
from unmoved.core.precision import float32_only
from unmoved.core.threat import ThreatModel
from unmoved.core.views import Views
from unmoved.terms import Margin
from unmoved.terms.margin import margin

MARGIN = Margin()
CLEAR = 64


@contextmanager
def searching(model: nn.Module, batch: Batch, threat: ThreatModel) -> Iterator[Views]:
    """Apply `attacking` in evaluation mode, outside autocast: a boundary found in bf16 is not the one judged."""
    with attacking(model, batch, threat) as views, float32_only(views.x.device):
        yield views


def clear(views: Views, x_adv: Image, threat: ThreatModel, further_by: float = 0.0) -> Image:
    """Move proposals a little further from the clean images, if they stay misclassified.

    Rounding can make a point at the boundary misclassified in one batch size or precision and right in another, and
    where both logits are about zero their size does not bound it. So points move outwards by a share ``further_by`` of
    the distance, and at least by `CLEAR` units in the last place of the images: the shift of a boundary by rounding in
    the first layer, times a margin for the later layers. No point is moved out of the ball of radius eps.
    """
    x, (low, high) = views.x, threat.bounds
    away = length((x_adv - x).flatten(1), threat.norm)
    # Rounding adds up like noise over all pixels, while in l1 only few pixels move.
    ulps = CLEAR * torch.finfo(x.dtype).eps * max(abs(low), abs(high))
    ulps = ulps * x[0].numel() ** 0.5 if threat.norm == "l1" else ulps
    reach = away + (further_by * away).clamp_min(ulps)
    reach = torch.where(away <= threat.radius, reach.clamp_max(threat.radius), reach)
    stretch = torch.where(away > 0, reach / away.clamp_min(torch.finfo(x.dtype).tiny), 1.0)
    further = (x + per_image(stretch, x) * (x_adv - x)).clamp(low, high)
    with torch.no_grad():
        is_clear = crossed(views.at(further).adv, views.y)
    return torch.where(per_image(is_clear, x), further, x_adv)


class Nearest:
    """Keep the nearest misclassified point found so far for each sample; the clean image where there is none.

    Attributes:
        x: (B, C, H, W) those points.
        distance: (B,) their distances; inf if there is none, 0 if the clean image is misclassified.
        open: (n,) int64, positions of the samples to attack: those that the model gets right.
        views: the views of these samples.
        margin: (n,) their margins at the clean image.
    """

    def __init__(self, views: Views, threat: ThreatModel) -> None:
        with torch.no_grad():
            logits = views.at(views.x).adv
        wrong = crossed(logits, views.y)
        self.x, self.threat, self.norm = views.x.clone(), threat, threat.norm
        self.distance = torch.full(wrong.shape, math.inf, dtype=self.x.dtype, device=self.x.device)
        self.distance[wrong] = 0
        self.open = torch.nonzero(~wrong).flatten()
        self.views = views.take(self.open)
        self.margin = margin(logits, views.y)[self.open]

    def cleared(self, further_by: float = 0.0) -> Image:
        """Return `x`, moved beyond the boundary by more than rounding; see `clear`."""
        broken = torch.nonzero(self.distance[self.open].isfinite()).flatten()
        if len(broken):
            rows = self.open[broken]
            self.x[rows] = clear(self.views.take(broken), self.x[rows], self.threat, further_by)
        return self.x

    def offer(self, position: Tensor, x_adv: Image, wrong: Tensor, x: Image) -> None:
        """Keep the points ``x_adv`` (n, C, H, W) that are misclassified and nearer to ``x`` than those before.

        Args:
            position: (n,) int64, which samples of the batch they belong to; each at most once.
        """
        away = length((x_adv - x).flatten(1), self.norm)
        better = wrong & (away < self.distance[position])
        self.distance[position] = torch.where(better, away, self.distance[position])
        self.x[position] = torch.where(per_image(better, x), x_adv, self.x[position])
