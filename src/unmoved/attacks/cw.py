"""Attack as Carlini and Wagner: weigh distance against margin, and search for the weight."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from unmoved.attacks.call_signature import takes_images
from unmoved.attacks.gradients import crossed, gradient_at, rounding
from unmoved.attacks.minimum_norm import MARGIN, Nearest, searching
from unmoved.core.batch import Batch, Image, PerSample, per_image
from unmoved.core.errors import UnmovedError, number_field, whole_field
from unmoved.core.threat import ThreatModel, require_threat
from unmoved.core.views import Views

# How far inside the box (a share of its width) tanh space begins: at the edge its gradient is zero for good.
INSET = 1e-4


@dataclass(frozen=True)
class CW:
    """The l2 attack of Carlini and Wagner (2017, section VI.A).

    ``min_w ||x' - x||_2^2 + c max(z_y - max_{j != y} z_j + confidence, 0) / u`` with ``x' = (tanh(w) + 1) / 2`` scaled
    to the valid images, by Adam; u is the value of the maximum at x, and distances are in widths of the bounds. c is
    searched per sample: halfway between the largest that failed and the smallest that succeeded, ten times larger while
    none succeeded. On a linear model the right c is twice the squared distance, whatever the scale of the logits.

    The threat model's eps is not used: the nearest misclassified point seen is proposed, wherever it is, and the
    clean image where none is. A misclassified image is returned as it is.

    Args:
        threat: norm l2, and bounds.
        steps: Adam steps for each c (10000 in the paper, 1000 in the authors' later code).
        search_steps: values of c tried (9 in the authors' code).
        confidence: margin in logits that a success must have (kappa).
        lr: learning rate of Adam; far smaller distances than its first steps are not found exactly.
        initial_const: the first c (1e-3 in the authors' code, where u is 1).

    Raises:
        UnmovedError: a norm other than l2, or a value outside its bounds.

    Deviations: tanh space begins 1e-4 inside the box, so that pixels at exactly 0 or 1 can move; distances are from
    the clean image itself. A sample gives a c up where its objective fell by less than 0.01 % over a tenth of the
    steps (the authors ask the whole batch). The unit u (the authors' c depends on the scale of the logits).
    "Misclassified" asks for a margin above rounding.
    """

    threat: ThreatModel
    steps: int = 1000
    search_steps: int = 9
    confidence: float = 0.0
    lr: float = 0.01
    initial_const: float = 1e-3

    minimum_norm = True

    def __post_init__(self) -> None:
        require_threat("CW.threat", self.threat)
        whole_field(self, "CW.steps", at_least=1)
        whole_field(self, "CW.search_steps", at_least=1)
        number_field(self, "CW.confidence", at_least=0)
        number_field(self, "CW.lr", above=0)
        number_field(self, "CW.initial_const", above=0)
        if self.threat.norm != "l2":
            raise UnmovedError(f"CW: expected norm l2, came {self.threat.norm}; use FMN for other norms")

    @takes_images
    def __call__(self, model: nn.Module, batch: Batch) -> Image:
        with searching(model, batch, self.threat) as views:
            nearest = Nearest(views, self.threat)
            if len(nearest.open):
                self._search(nearest)
            return nearest.cleared()

    def _search(self, nearest: Nearest) -> None:
        const = torch.full_like(nearest.distance[nearest.open], self.initial_const)
        failed, succeeded = torch.zeros_like(const), torch.full_like(const, math.inf)
        for _ in range(self.search_steps):
            success = self._descend(nearest, const)
            succeeded = torch.where(success, torch.minimum(succeeded, const), succeeded)
            failed = torch.where(success, failed, torch.maximum(failed, const))
            const = torch.where(succeeded.isinf(), 10 * const, (failed + succeeded) / 2)

    def _descend(self, nearest: Nearest, const: PerSample) -> Tensor:
        """Minimise the objective for these constants, offer each success, and return which samples had one, (n,)."""
        views, position = nearest.views, torch.arange(len(const), device=const.device)
        success = torch.zeros_like(const, dtype=torch.bool)
        unit = (nearest.margin.abs() + self.confidence).to(const.dtype).clamp_min(torch.finfo(const.dtype).tiny)
        low, high = self.threat.bounds
        w = torch.atanh(((views.x - low) / (high - low)).clamp(INSET, 1 - INSET) * 2 - 1)
        mean, square = torch.zeros_like(w), torch.zeros_like(w)
        checked = torch.full_like(const, math.inf)
        interval = max(self.steps // 10, 1)
        for step in range(1, self.steps + 1):
            x_adv, slope = self._from_tanh_space(w)
            objective, gradient, wrong = self._objective(views, x_adv, const, unit)
            nearest.offer(nearest.open[position], x_adv, wrong, views.x)
            success[position] = success[position] | wrong
            if step % interval == 0:
                go = torch.nonzero(objective < 0.9999 * checked).flatten()
                if len(go) == 0:
                    return success
                views, position, checked = views.take(go), position[go], objective[go]
                const, unit = const[go], unit[go]
                w, mean, square, gradient, slope = w[go], mean[go], square[go], gradient[go], slope[go]
            gradient = gradient * slope
            mean = 0.9 * mean + 0.1 * gradient
            square = 0.999 * square + 0.001 * gradient.square()
            size = (square / (1 - 0.999**step)).sqrt() + 1e-8
            w = w - self.lr * mean / (1 - 0.9**step) / size
        x_adv, _ = self._from_tanh_space(w)
        with torch.no_grad():
            wrong = self._succeeds(views, views.at(x_adv).adv)
        nearest.offer(nearest.open[position], x_adv, wrong, views.x)
        success[position] = success[position] | wrong
        return success

    def _objective(
        self, views: Views, x_adv: Image, const: PerSample, unit: PerSample
    ) -> tuple[PerSample, Tensor, Tensor]:
        """Return the objective (n,), its gradient over the image, and which are misclassified with confidence (n,)."""
        margin, ascent, logits = gradient_at(views, x_adv, MARGIN)
        low, high = self.threat.bounds
        delta = (x_adv - views.x) / (high - low)
        short = (self.confidence + 2 * rounding(logits, views.y) - margin).to(delta.dtype) / unit
        objective = delta.flatten(1).square().sum(dim=1) + const * short.clamp_min(0)
        gradient = 2 / (high - low) * delta - per_image(const / unit * (short > 0), delta) * ascent
        return objective, gradient, self._succeeds(views, logits)

    def _succeeds(self, views: Views, logits: Tensor) -> Tensor:
        if self.confidence == 0:
            return crossed(logits, views.y)
        return crossed(logits, views.y) & (MARGIN(views.of(y=views.y, adv=logits)) >= self.confidence)

    def _from_tanh_space(self, w: Tensor) -> tuple[Image, Tensor]:
        """Return the images, and their slope over w."""
        low, high = self.threat.bounds
        tanh = torch.tanh(w)
        return ((tanh + 1) / 2 * (high - low) + low).clamp(low, high), (1 - tanh.square()) * (high - low) / 2
