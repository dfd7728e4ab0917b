"""Estimate how far each sample is from being misclassified, from one short search for its decision boundary."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from unmoved.core.batch import Batch, Image
from unmoved.core.protocols import Attack
from unmoved.core.threat import ThreatModel
from unmoved.core.views import eval_logits
from unmoved.terms.margin import margin


class DistanceEstimate(NamedTuple):
    """Hold estimates of the distance to the decision boundary.

    Attributes:
        distance: (B,) in units of eps; infinity where no boundary was found.
        in_ball: (B, C, H, W) the images that the search found, each moved towards the clean image into the ball.
    """

    distance: Tensor
    in_ball: Image


@dataclass(frozen=True)
class DistanceEstimator:
    """Estimate the distance to the boundary by extrapolating the margin along the line to a misclassified image.

    A search finds a misclassified image x' near x; s is the point where the line from x to x' leaves the ball, and
    m the margin ``z_y - max_{j != y} z_j``: ``s = x + min(1, eps / ||x' - x||) (x' - x)``,
    ``distance = m(x) / (m(x) - m(s))``, in units of eps. That is where the margin would be zero if it went on falling
    as it does from x to s: exact if the margin is linear, and at most 1 if s is misclassified. ``||x' - x||`` itself
    tells less: on adversarially trained MNIST networks nearly all boundaries that a search finds lie within 1.3 eps,
    while few samples can be broken.

    Args:
        threat: the ball.
        search: a minimum-norm attack.
    """

    threat: ThreatModel
    search: Attack

    def __call__(self, model: nn.Module, batch: Batch) -> DistanceEstimate:
        found = self.search(model, batch)
        length = self.threat.distance(found, batch.x)
        share = (self.threat.radius / length.clamp_min(1e-12)).clamp_max(1).to(found.dtype)
        in_ball = batch.x + share.view(-1, *[1] * (found.dim() - 1)) * (found - batch.x)
        clean, there, beyond = (-margin(eval_logits(model, x), batch.y) for x in (batch.x, in_ball, found))
        fall = clean - there
        distance = torch.where(fall > 0, clean / fall.clamp_min(1e-12), torch.inf)
        return DistanceEstimate(distance.masked_fill(beyond > 0, torch.inf), in_ball)
