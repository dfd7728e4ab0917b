"""Attack by PGD from output-diversified starts, its step falling along half a cosine: few steps, many starts."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from unmoved.attacks.apgd_steps import with_momentum
from unmoved.attacks.call_signature import takes_images
from unmoved.attacks.gradients import Best, attacking, broken, gradient_at, value_at
from unmoved.attacks.relu_backward import smoothed
from unmoved.attacks.rounds import Retired, Round, Start, compacts, in_rounds
from unmoved.core import noise
from unmoved.core.batch import Batch, Image, PerSample
from unmoved.core.errors import keep_field, number_field, require_seed, whole_field
from unmoved.core.preconditions import require_loss
from unmoved.core.protocols import Term
from unmoved.core.threat import ThreatModel, require_threat
from unmoved.core.views import Views
from unmoved.terms import Margin

DIRECTIONS = 1 << 40  # streams of noise that no start uses


@dataclass(frozen=True)
class DiversifiedPGD:
    """PGD from output-diversified starts (ODI-PGD, Tashiro et al. 2020, eq. 2 and 3) with cosine steps.

    From a random point of the ball ``start_steps`` steps of length eps go up ``w . z(x')``, with ``w`` uniform in
    [-1, 1]^K: starts differ in the model's outputs, not only in pixels. Then ``z = P(x + s_k g)``,
    ``x <- P(x + 0.75 (z - x) + 0.25 (x - x_old))`` as in Auto-PGD, ``s_k = eps (1 + cos(pi k / steps))`` (the cosine
    schedule of Liu et al. 2022, A3, section 3): with few steps it breaks more samples than halving does.

    Args:
        threat: the ball.
        loss: the term to maximise.
        steps: number of gradient steps after the start.
        start_steps: gradient steps of the start; 0 starts at the clean image, in each restart the same.
        restarts: independent starts; a success is final.
        targets: aim in turn at this many wrong classes, by falling clean logit, with a loss that reads
            ``views.target``; 0 for an untargeted loss.
        smooth: alpha of a softplus whose derivative stands in for ReLU's, 0 for none; see `relu_backward.smoothed`.
        seed: keys the starts.

    Raises:
        UnmovedError: a value outside its bounds.

    Deviations: a sample is left at its first misclassified point. The momentum is Auto-PGD's; both papers have none.
    """

    threat: ThreatModel
    loss: Term = Margin()
    steps: int = 20
    start_steps: int = 5
    restarts: int = 1
    targets: int = 0
    smooth: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        require_threat("DiversifiedPGD.threat", self.threat)
        require_loss("DiversifiedPGD.loss", self.loss)
        for name, least in (("steps", 1), ("start_steps", 0), ("restarts", 1), ("targets", 0)):
            whole_field(self, f"DiversifiedPGD.{name}", at_least=least)
        number_field(self, "DiversifiedPGD.smooth", at_least=0)
        keep_field(self, "DiversifiedPGD.seed", require_seed)

    @takes_images
    def __call__(self, model: nn.Module, batch: Batch) -> Image:
        with attacking(model, batch, self.threat) as views, smoothed(self.smooth):
            if self.threat.radius == 0 or len(batch) == 0:
                return views.x.clone()
            return in_rounds(views, self.restarts, self.targets, self._start_of(views), self._climb, until_broken=True)

    def _start_of(self, views: Views) -> Start:
        """Return the function that makes the first iterates of a round."""

        def start(batch: Batch, each: Round) -> Image:
            if self.start_steps == 0:
                return batch.x
            base = Views(views.model, batch)
            outputs = _WeightedOutputs(batch, self.seed, each.stream)
            x_adv = self.threat.start(batch, seed=self.seed, stream=each.stream)
            for _ in range(self.start_steps):
                _, gradient, _ = gradient_at(base, x_adv, outputs)
                x_adv = self.threat.ascend(x_adv, gradient, self.threat.radius, batch.x)
            return x_adv

        return start

    def _climb(self, base: Views, x_adv: Image, retired: Retired | None) -> Best:
        best, position, x_old = Best(), torch.arange(len(x_adv), device=x_adv.device), x_adv
        for step in range(self.steps):
            value, gradient, logits = gradient_at(base, x_adv, self.loss)
            best.offer(x_adv, value, broken(base.model, x_adv, logits, base.y), position)
            if retired is not None and compacts(x_adv.device, step):
                keep = torch.nonzero(~retired(best.wrong[position], position)).flatten()
                if len(keep) < len(position):
                    base, position, x_adv = base.take(keep), position[keep], x_adv[keep]
                    gradient, x_old = gradient[keep], x_old[keep]
                if len(position) == 0:
                    return best
            size = self.threat.radius * (1 + math.cos(math.pi * step / self.steps))
            moved = with_momentum(self.threat, base.x, x_adv, x_old, gradient, size, step)
            x_old, x_adv = x_adv, moved
        value, logits = value_at(base, x_adv, self.loss)
        best.offer(x_adv, value, broken(base.model, x_adv, logits, base.y), position)
        return best


class _WeightedOutputs:
    """The term ``w . z``, with w drawn for each sample once the number of classes is known."""

    def __init__(self, batch: Batch, seed: int, stream: int) -> None:
        self.batch, self.seed, self.stream = batch, seed, stream
        self.weights: Tensor | None = None

    def __call__(self, views: Views) -> PerSample:
        logits = views.adv
        if self.weights is None:
            key = {"seed": self.seed, "step": self.batch.step, "stream": DIRECTIONS + self.stream}
            self.weights = (noise.uniform(self.batch.index, (logits.shape[1],), **key) * 2 - 1).to(logits.dtype)
        return (self.weights * logits).sum(dim=1)
