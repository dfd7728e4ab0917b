"""Attack by SPSA: estimate gradients from values of the loss alone, by simultaneous perturbation."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from unmoved.attacks.call_signature import takes_images
from unmoved.attacks.gradients import Best, attacking, broken, value_at
from unmoved.core import noise
from unmoved.core.batch import Batch, Image, per_image
from unmoved.core.errors import keep_field, number_field, require_seed, whole_field
from unmoved.core.preconditions import require_loss
from unmoved.core.protocols import QUERIES, Term
from unmoved.core.threat import ThreatModel, require_threat
from unmoved.core.views import Views
from unmoved.terms import Margin

# Approximate number of images in a forward pass; the estimate does not depend on it.
PASS = 1024
# Signs cut from one random number.
SIGNS = 16


@dataclass(frozen=True)
class SPSA:
    """Simultaneous perturbation stochastic approximation (Uesato et al. 2018, algorithm 1).

    ``g = mean_i (L(x' + delta v_i) - L(x' - delta v_i)) / (2 delta) v_i`` with signs ``v_i`` in {-1, 1}^d drawn anew
    at each step; ``x' <- project(x' + step_size * Adam(g))``. Values of the loss are all it asks of the model, so a
    model whose gradients vanish or do not exist hides nothing from it. A sample is done when it is misclassified;
    one that never is keeps its highest loss.

    Args:
        threat: the ball.
        steps: number of steps, each of 2 * ``samples`` + 1 forward passes.
        samples: directions of an estimate (the paper's batch size, 128 to 8192).
        delta: half the distance between the two points of a direction; ``None`` is 0.01 (the paper's), on images in
            [0, 1], and as much of the width of other bounds.
        step_size: learning rate of Adam for linf (0.01 in the paper); in the other norms the length of a step along
            the steepest direction of Adam's averaged gradient. ``None`` is 5 * eps / steps.
        loss: the term to maximise (the margin in the paper).
        seed: keys the signs.

    Raises:
        UnmovedError: a value outside its bounds.

    Deviations: norms other than linf, see ``step_size``. The start is the clean image.
    """

    threat: ThreatModel
    steps: int = 20
    samples: int = 128
    delta: float | None = None
    step_size: float | None = None
    loss: Term = Margin("adv")
    seed: int = 0
    kind = QUERIES

    def __post_init__(self) -> None:
        require_threat("SPSA.threat", self.threat)
        require_loss("SPSA.loss", self.loss)
        whole_field(self, "SPSA.steps", at_least=1)
        whole_field(self, "SPSA.samples", at_least=1)
        if self.delta is not None:
            number_field(self, "SPSA.delta", above=0)
        if self.step_size is not None:
            number_field(self, "SPSA.step_size", above=0)
        keep_field(self, "SPSA.seed", require_seed)

    @takes_images
    def __call__(self, model: nn.Module, batch: Batch) -> Image:
        with attacking(model, batch, self.threat) as views, torch.no_grad():
            if self.threat.radius == 0 or len(batch) == 0:
                return views.x.clone()
            return self._climb(views)

    def _climb(self, views: Views) -> Image:
        x_adv, best = views.x, Best()
        position = torch.arange(len(x_adv), device=x_adv.device)
        mean, square = torch.zeros_like(x_adv), torch.zeros_like(x_adv)
        unit = x_adv.new_zeros(len(x_adv))
        step_size = 5 * self.threat.radius / self.steps if self.step_size is None else self.step_size
        for step in range(self.steps + 1):
            value, logits = value_at(views, x_adv, self.loss)
            wrong = broken(views.model, x_adv, logits, views.y)
            best.offer(x_adv, value, wrong, position)
            go = torch.nonzero(~wrong).flatten()
            if step == self.steps or len(go) == 0:
                break
            if len(go) < len(position):
                views, position = views.take(go), position[go]
                x_adv, mean, square, unit = x_adv[go], mean[go], square[go], unit[go]
            gradient = self._estimate(views, x_adv, step)
            # In units of the first estimate, or Adam's 1e-8 and the squares would know the scale of the logits.
            unit = torch.where(unit > 0, unit, gradient.flatten(1).abs().amax(dim=1))
            gradient = gradient / per_image(torch.where(unit > 0, unit, 1.0), x_adv)
            mean = 0.9 * mean + 0.1 * gradient
            square = 0.999 * square + 0.001 * gradient.square()
            if self.threat.norm == "linf":
                size = (square / (1 - 0.999 ** (step + 1))).sqrt() + 1e-8
                move = mean / (1 - 0.9 ** (step + 1)) / size
                x_adv = self.threat.project(x_adv + step_size * move, views.x)
            else:
                x_adv = self.threat.ascend(x_adv, mean, step_size, views.x)
        return best.x if best.x is not None else views.x

    def _estimate(self, views: Views, x_adv: Image, step: int) -> Tensor:
        """Estimate the gradient from ``samples`` pairs of values at opposite points, (n, C, H, W)."""
        low, high = self.threat.bounds
        delta = 0.01 * (high - low) if self.delta is None else self.delta
        total = torch.zeros_like(x_adv)
        owner = torch.arange(len(x_adv), device=x_adv.device)
        together = max(1, PASS // (2 * len(x_adv)))
        draws = -(-self.samples // SIGNS)
        for draw in range(draws):
            key = {"seed": self.seed, "step": views.batch.step, "stream": step * draws + draw}
            bits = (noise.uniform(views.index, tuple(x_adv.shape[1:]), **key) * 2**SIGNS).long()
            for ahead in torch.arange(min(SIGNS, self.samples - draw * SIGNS)).split(together):
                k = per_image(ahead.to(bits.device), bits[None])
                v = (((bits >> k) & 1) * 2 - 1).to(x_adv.dtype)  # (m, n, C, H, W)
                points = torch.stack([x_adv + delta * v, x_adv - delta * v]).flatten(0, 2)
                value, _ = value_at(views.take(owner.repeat(2 * len(v))), points, self.loss)
                up, down = value.to(x_adv.dtype).reshape(2, len(v), len(x_adv), *[1] * (x_adv.ndim - 1))
                total += ((up - down) * v).sum(dim=0)
        return total / (2 * delta * self.samples)
