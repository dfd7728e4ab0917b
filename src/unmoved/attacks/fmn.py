"""Attack by FMN: shrink and grow a ball until it touches the decision boundary."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from unmoved.attacks.call_signature import takes_images
from unmoved.attacks.gradients import crossed, gradient_at, rounding
from unmoved.attacks.hyperplanes import dual_length, length
from unmoved.attacks.minimum_norm import MARGIN, Nearest, searching
from unmoved.attacks.relu_backward import smoothed
from unmoved.core.batch import Batch, Image, PerSample, per_image
from unmoved.core.errors import number_field, whole_field
from unmoved.core.threat import ThreatModel, require_threat


def annealed(start: float, stop: float, share: float) -> float:
    """Go from ``start`` to ``stop`` along half a cosine, as ``share`` goes from 0 to 1."""
    return stop + (start - stop) * (1 + math.cos(math.pi * share)) / 2


@dataclass(frozen=True)
class FMN:
    """Fast minimum-norm attack (Pintor et al. 2021, algorithm 1): a ball shrinks and grows to the boundary.

    With the margin ``L = max_{j != y} z_j - z_y``, ``g = grad_x' L`` and ``s = |L| / ||g||_q``, 1/p + 1/q = 1, the
    distance to the boundary if the model were linear: where x' is right, ``eps <- (||x' - x||_p + s) (1 + gamma)``
    until a first misclassified point is found and ``eps <- eps (1 + gamma)`` after it; where x' is misclassified,
    ``eps <- min(eps (1 - gamma), (eps + ||x' - x||_p - s) / 2, nearest so far)``, but at least half of eps or that
    nearest. Then ``x' <- project(x' + 2 alpha eps u, eps)``, u the steepest step of length 1 within the valid images,
    in l1 ``g / ||g||_2``. alpha and gamma fall along half a cosine, to alpha / 100 and 0.001.

    The threat model's eps is not used: the nearest point is proposed, wherever it is, and the clean image where
    none is found. A misclassified image is returned as it is. One boundary is followed, that of the best wrong class
    on the way; `FAB` tries several and takes many times as long.

    Args:
        threat: norm (linf, l2 or l1) and bounds.
        steps: gradient steps; one pass more judges the last point. 30 are nearly as good as 100 where time is short.
        step_size: alpha at the first step, in diameters of the ball.
        gamma: change of the radius at the first step (0.05 in the paper).
        smooth: alpha of a softplus whose derivative stands in for ReLU's, 0 for none; see `relu_backward.smoothed`.

    Raises:
        UnmovedError: a value outside its bounds.

    Deviations: steps grow with the ball and are steepest in linf and l2 (the paper's have the l2 length alpha in every
    norm, which needs tuning to the norm and the size of the images). A misclassified point's margin shortens the
    radius (the paper's falls by gamma alone, slowly where the first point found is far). The factor 1 + gamma before
    the first such point: a boundary met exactly is not crossed. The projection knows the box (the paper's clips after
    it), so that pixels that cannot move use up no radius. "Misclassified" asks for a margin above rounding. The last
    point is judged too.
    """

    threat: ThreatModel
    steps: int = 100
    step_size: float = 1.0
    gamma: float = 0.05
    smooth: float = 0.0

    minimum_norm = True

    def __post_init__(self) -> None:
        require_threat("FMN.threat", self.threat)
        whole_field(self, "FMN.steps", at_least=1)
        number_field(self, "FMN.step_size", above=0)
        number_field(self, "FMN.gamma", above=0, at_most=1)
        number_field(self, "FMN.smooth", at_least=0)

    @takes_images
    def __call__(self, model: nn.Module, batch: Batch) -> Image:
        with searching(model, batch, self.threat) as views, smoothed(self.smooth):
            nearest = Nearest(views, self.threat)
            if len(nearest.open):
                self._search(nearest)
            return nearest.cleared()

    def _search(self, nearest: Nearest) -> None:
        views, threat = nearest.views, self.threat
        x = x_adv = views.x
        low, high = threat.bounds
        largest = float(length(torch.full_like(x[:1], high - low).flatten(1), threat.norm))
        radius = torch.full_like(nearest.distance[nearest.open], largest)
        for step in range(self.steps):
            value, gradient, logits = gradient_at(views, x_adv, MARGIN)
            wrong, value = crossed(logits, views.y), value - 2 * rounding(logits, views.y)
            nearest.offer(nearest.open, x_adv, wrong, x)
            gamma = annealed(self.gamma, min(0.001, self.gamma), step / self.steps)
            radius = self._next_radius(nearest, radius, gamma, wrong, value, gradient, x_adv).clamp_max(largest)
            alpha = annealed(self.step_size, self.step_size / 100, step / self.steps)
            x_adv = self._moved(x_adv, gradient, per_image(2 * alpha * radius, x), x, radius)
        with torch.no_grad():
            nearest.offer(nearest.open, x_adv, crossed(views.at(x_adv).adv, views.y), x)

    def _next_radius(
        self,
        nearest: Nearest,
        radius: PerSample,
        gamma: float,
        wrong: Tensor,
        value: PerSample,
        gradient: Tensor,
        x_adv: Image,
    ) -> PerSample:
        """Return the next radius (n,): larger where the point is right, smaller where it is misclassified."""
        away = length((x_adv - nearest.views.x).flatten(1), self.threat.norm)
        slope = dual_length(gradient.flatten(1), self.threat.norm).clamp_min(1e-30)
        to_boundary, top = value.abs().to(away.dtype) / slope, nearest.distance[nearest.open]
        out = torch.where(top.isinf(), away + to_boundary, radius) * (1 + gamma)
        linear = torch.maximum((radius + away - to_boundary) / 2, radius / 2)
        return torch.where(wrong, torch.minimum(torch.minimum(radius * (1 - gamma), linear), top), out)

    def _moved(self, x_adv: Image, gradient: Tensor, size: Tensor, x: Image, radius: PerSample) -> Image:
        """Take a step of length ``size`` and project; in l1 along the gradient, which the projection makes sparse."""
        if self.threat.norm != "l1":
            return self.threat.ascend(x_adv, gradient, size, x, radius)
        unit = gradient / per_image(length(gradient.flatten(1), "l2").clamp_min(torch.finfo(x.dtype).tiny), x)
        return self.threat.project(x_adv + size * unit, x, radius)
