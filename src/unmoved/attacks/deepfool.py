"""Attack by DeepFool: step after step to the nearest boundary of the linearised model."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from unmoved.attacks.call_signature import takes_images
from unmoved.attacks.gradients import crossed, input_gradient, not_differentiable, rounding
from unmoved.attacks.hyperplanes import dual_length, length, toward
from unmoved.attacks.minimum_norm import Nearest, searching
from unmoved.core.batch import Batch, Image
from unmoved.core.errors import UnmovedError, number_field, whole_field
from unmoved.core.threat import ThreatModel, require_threat
from unmoved.core.views import Views, ranked_wrong


@dataclass(frozen=True)
class DeepFool:
    """DeepFool (Moosavi-Dezfooli et al. 2016, algorithm 2; eqs. (10) and (11) for linf).

    With ``f_k = z_k - z_y`` and ``w_k = grad_x' f_k`` for the candidate classes k, the nearest boundary of the
    linearised model is ``l = argmin_k |f_k| / ||w_k||_q``, 1/p + 1/q = 1, and the step there
    ``r = |f_l| / ||w_l||_q steepest(w_l)``; where the box of valid images is in the way, the nearest boundary and the
    step are those within it (`hyperplanes.to_hyperplane`). The point tried is ``x + (1 + overshoot) sum r``; a sample
    stops at the first that is misclassified.

    The threat model's eps is not used: that point is proposed, wherever it is, and the clean image where none is
    found. A misclassified image is returned as it is.

    Args:
        threat: norm (linf or l2) and bounds.
        steps: at most this many steps (50 in the paper).
        overshoot: share by which the boundary is crossed (0.02 in the paper).
        candidates: wrong classes with the highest clean logits that are considered (9 in the authors' code); each
            costs a backward pass a step.

    Raises:
        UnmovedError: norm l1, or a value outside its bounds.

    Deviations: the box, which the paper leaves out; points are clipped to it at each step. A step is at least as
    long as rounding asks for (the authors add 1e-4 to each). "Misclassified" asks for a margin above rounding.
    """

    threat: ThreatModel
    steps: int = 50
    overshoot: float = 0.02
    candidates: int = 10

    minimum_norm = True

    def __post_init__(self) -> None:
        require_threat("DeepFool.threat", self.threat)
        whole_field(self, "DeepFool.steps", at_least=1)
        number_field(self, "DeepFool.overshoot", at_least=0)
        whole_field(self, "DeepFool.candidates", at_least=1)
        if self.threat.norm not in ("linf", "l2"):
            raise UnmovedError(
                f"DeepFool: expected norm linf or l2, came {self.threat.norm}: its l1 step moves one pixel, which the "
                "box of valid images stops; use FMN"
            )

    @takes_images
    def __call__(self, model: nn.Module, batch: Batch) -> Image:
        with searching(model, batch, self.threat) as views:
            nearest = Nearest(views, self.threat)
            if len(nearest.open):
                self._walk(nearest)
            return nearest.cleared()

    def _walk(self, nearest: Nearest) -> None:
        views, position = nearest.views, nearest.open
        total, classes = torch.zeros_like(views.x), None
        low, high = self.threat.bounds
        for _ in range(self.steps):
            x_adv = views.x + (1 + self.overshoot) * total
            step, wrong, classes = self._linearised(views, x_adv, classes)
            nearest.offer(position, x_adv, wrong, views.x)
            go = torch.nonzero(~wrong).flatten()
            if len(go) == 0:
                return
            views, position, total, classes = views.take(go), position[go], total[go] + step[go], classes[go]
            # The part outside the box is dropped, so that a pixel can turn back at once.
            tried = (views.x + (1 + self.overshoot) * total).clamp(low, high)
            total = (tried - views.x) / (1 + self.overshoot)
        x_adv = views.x + (1 + self.overshoot) * total
        with torch.no_grad():
            nearest.offer(position, x_adv, crossed(views.at(x_adv).adv, views.y), views.x)

    def _linearised(self, views: Views, x_adv: Image, classes: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Return the step to the nearest linear boundary, whether it is misclassified (B,), the candidates (B, k)."""
        x = x_adv.detach().requires_grad_(True)
        z = views.at(x).adv
        if classes is None:
            classes = ranked_wrong(z.detach(), views.y)[:, : self.candidates]
        gap = z.gather(1, classes) - z.gather(1, views.y[:, None])
        norm, bounds = self.threat.norm, self.threat.bounds
        # Two units in the last place of every pixel.
        ulps = 2 * torch.finfo(x.dtype).eps * max(abs(edge) for edge in bounds)
        least = length(torch.full_like(x_adv, ulps).flatten(1), norm)
        clear = 2 * rounding(z.detach(), views.y).to(x.dtype)
        shortest, step = torch.full_like(least, torch.inf), torch.zeros_like(x_adv).flatten(1)
        for k in range(gap.shape[1]):
            normal = input_gradient(gap[:, k], x, retain=k + 1 < gap.shape[1])
            if normal is None:
                raise not_differentiable(views.model)
            w = normal.flatten(1)
            needed = torch.maximum(gap[:, k].detach().abs().to(x.dtype), clear)
            excess = -torch.maximum(needed, least * dual_length(w, norm))
            way, away = toward(x_adv.flatten(1), w, excess, norm, bounds)
            nearer = away < shortest
            shortest, step = torch.where(nearer, away, shortest), torch.where(nearer[:, None], way, step)
        return step.reshape(x.shape), crossed(z.detach(), views.y), classes
