"""What attacks that seek the decision boundary share: full precision, and the nearest misclassified point so far."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from unmoved.attacks.ascent import attacking, like
from unmoved.attacks.hyperplanes import length
from unmoved.precision import exact
from unmoved.protocols import Batch, Image, Label, Logits, PerSample
from unmoved.terms import Margin
from unmoved.terms.margin import margin
from unmoved.threat import ThreatModel
from unmoved.views import Views

MARGIN = Margin()


@contextmanager
def searching(model: nn.Module, batch: Batch, threat: ThreatModel) -> Iterator[Views]:
    """`attacking` in evaluation mode and outside autocast: a boundary found in bf16 is not the one that is judged."""
    with attacking(model, batch, threat) as views, exact(views.x.device):
        yield views


def crossed(logits: Logits, y: Label) -> Tensor:
    """(B,) bool: misclassified by more than what another batch size may round away."""
    return margin(logits, y) > rounding(logits)


def rounding(logits: Logits) -> PerSample:
    """(B,) how far a margin may be off by another order of the same sums."""
    return 8 * torch.finfo(logits.dtype).eps * logits.abs().amax(dim=1)


class Nearest:
    """The nearest misclassified point found so far for each sample; the clean image where there is none.

    Attributes:
        x: (B, C, H, W) those points.
        distance: (B,) how far they are; inf where there is none, 0 where the clean image is misclassified.
        open: (n,) int64, positions of the samples to attack: those that the model gets right.
        views: the views of these samples.
    """

    def __init__(self, views: Views, norm: str) -> None:
        with torch.no_grad():
            wrong = views.at(views.x).adv.argmax(dim=1) != views.y
        self.x, self.norm = views.x.clone(), norm
        self.distance = torch.full(wrong.shape, math.inf, dtype=self.x.dtype, device=self.x.device)
        self.distance[wrong] = 0
        self.open = torch.nonzero(~wrong).flatten()
        self.views = views.take(self.open)

    def offer(self, position: Tensor, x_adv: Image, wrong: Tensor, x: Image) -> None:
        """Keep the points ``x_adv`` (n, C, H, W) that are misclassified and nearer to ``x`` than those before.

        Args:
            position: (n,) int64, which samples of the batch they belong to; each at most once.
        """
        away = length((x_adv - x).flatten(1), self.norm)
        better = wrong & (away < self.distance[position])
        self.distance[position] = torch.where(better, away, self.distance[position])
        self.x[position] = torch.where(like(x)(better), x_adv, self.x[position])
