"""Attack by FAB: walk along the decision boundary, drawn towards the clean image."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from unmoved.attacks.call_signature import takes_images
from unmoved.attacks.gradients import Best, crossed, input_gradient, not_differentiable, rounding
from unmoved.attacks.hyperplanes import length, to_hyperplane, toward
from unmoved.attacks.minimum_norm import clear, searching
from unmoved.attacks.rounds import Retired, Round, compacts, in_rounds
from unmoved.core import noise
from unmoved.core.batch import Batch, Image, Label, Logits, PerSample, per_image
from unmoved.core.errors import flag_field, keep_field, number_field, require_seed, whole_field
from unmoved.core.threat import ThreatModel, require_threat
from unmoved.core.views import Views
from unmoved.terms.margin import margin


@dataclass(frozen=True)
class FAB:
    """Fast adaptive boundary attack (Croce and Hein 2020, ICML, algorithm 1), a minimum-norm attack.

    With ``pi`` the boundary ``z_k = z_y`` of the model linearised at x', d1 and d2 the shortest steps to it, within
    the valid images, from x' and from the clean x: ``alpha = min(||d1|| / (||d1|| + ||d2||), alpha_max)`` and
    ``x' <- clip((1 - alpha) (x' + eta d1) + alpha (x + eta d2))``; where that point is misclassified it is kept if it
    is the nearest so far, and ``x' <- x + beta (x' - x)``.

    Proposed is the nearest misclassified point found, wherever it is, and the clean image where none was found or
    where that is misclassified itself. eps only sizes the random starts and says what ``until_broken`` calls broken.

    Args:
        threat: norm (linf, l2 or l1), eps and bounds.
        steps: each takes a gradient pass and a pass that judges the new point (100 in AutoAttack).
        restarts: independent starts: the clean image, then random points eps / 2 away.
        targeted: k is a given class, round after round (FAB-T); if not, k is the class whose boundary is nearest in
            the linearised model, at the price of a backward pass for each wrong class.
        targets: that many wrong classes, by falling clean logit (9 in AutoAttack).
        alpha_max: largest pull towards the clean image.
        eta: overshoot of the projections.
        beta: how far back a misclassified point is carried.
        until_broken: leave a sample at its first misclassified point within eps (AutoAttack's use).
        seed: keys the random starts.

    Raises:
        UnmovedError: a value outside its bounds, or a model that is not differentiable in its input.

    Deviations: "misclassified" asks for a margin above rounding (where the model is linear the walk comes back to the
    boundary exactly). The distance to the plane comes from the logits, not from <w, x'> - b, and no gradient is too
    small to count (the authors' code does not move pixels with one below 1e-8). The smallest of all points is kept
    over targets and restarts, not the first one within eps, unless ``until_broken``.
    """

    threat: ThreatModel
    steps: int = 100
    restarts: int = 1
    targeted: bool = True
    targets: int = 9
    alpha_max: float = 0.1
    eta: float = 1.05
    beta: float = 0.9
    until_broken: bool = False
    seed: int = 0

    minimum_norm = True

    def __post_init__(self) -> None:
        require_threat("FAB.threat", self.threat)
        for name in ("steps", "restarts", "targets"):
            whole_field(self, f"FAB.{name}", at_least=1)
        keep_field(self, "FAB.seed", require_seed)
        for name in ("alpha_max", "beta"):
            number_field(self, f"FAB.{name}", at_least=0, at_most=1)
        number_field(self, "FAB.eta", at_least=1)
        flag_field(self, "FAB.targeted")
        flag_field(self, "FAB.until_broken")

    @takes_images
    def __call__(self, model: nn.Module, batch: Batch) -> Image:
        with searching(model, batch, self.threat) as views:
            if len(batch) == 0:
                return views.x.clone()
            with torch.no_grad():
                right = torch.nonzero(~crossed(views.clean, views.y)).flatten()
            x_adv = views.x.clone()
            if len(right):
                targets = self.targets if self.targeted else 0
                few = views.take(right)
                nearest = in_rounds(
                    few, self.restarts, targets, self._start, self._search, until_broken=self.until_broken
                )
                x_adv[right] = clear(few, nearest, self.threat)
            return x_adv

    def _start(self, batch: Batch, each: Round) -> Image:
        """Return the clean image in a round's first restart, then a random point at distance eps / 2, clipped."""
        if each.restart == 0:
            return batch.x
        draw = noise.uniform if self.threat.norm == "linf" else noise.normal
        delta = draw(batch.index, tuple(batch.x.shape[1:]), seed=self.seed, step=batch.step, stream=each.stream)
        delta = delta * 2 - 1 if self.threat.norm == "linf" else delta
        size = length(delta.flatten(1), self.threat.norm).clamp_min(1e-12)
        move = per_image(self.threat.radius / 2 / size, delta) * delta
        return (batch.x + move.to(batch.x.dtype)).clamp(*self.threat.bounds)

    def _search(self, base: Views, x_adv: Image, retired: Retired | None) -> Best:
        """Return the nearest misclassified point of each row; a row is a sample with a target and a start."""
        nearest, position = base.x.clone(), torch.arange(len(x_adv), device=x_adv.device)
        distance = torch.full((len(x_adv),), torch.inf, dtype=x_adv.dtype, device=x_adv.device)
        for step in range(self.steps):
            x_adv = self._step(base.x, x_adv, *self._plane(base, x_adv))
            with torch.no_grad():
                wrong, back = _sides(base.at(x_adv).adv, base.y)
            delta = x_adv - base.x
            away = length(delta.flatten(1), self.threat.norm)
            better = wrong & (away < distance[position])
            distance[position] = torch.where(better, away, distance[position])
            nearest[position] = torch.where(per_image(better, x_adv), x_adv, nearest[position])
            x_adv = x_adv - per_image((1 - self.beta) * back.to(delta.dtype), delta) * delta
            if retired is not None and compacts(x_adv.device, step):
                keep = torch.nonzero(~retired(distance[position] <= self.threat.radius, position)).flatten()
                if len(keep) == 0:
                    break
                if len(keep) < len(position):
                    base, position, x_adv = base.take(keep), position[keep], x_adv[keep]
        broken, best = distance <= self.threat.radius, Best()
        best.offer(nearest, -distance, broken)
        return best

    def _plane(self, base: Views, x_adv: Image) -> tuple[PerSample, Tensor]:
        """Linearise ``z_k - z_y`` at x': return its value (B,) and its gradient (B, d), for the k of each row."""
        x = x_adv.detach().requires_grad_(True)
        z = base.at(x).adv
        classes = base.target[:, None] if self.targeted else _wrong_classes(base.y, z.shape[1])
        # A boundary shifted by the rounding error: a plane at 0 would be crossed in one batch size and not in another.
        gap = z.gather(1, classes) - z.gather(1, base.y[:, None]) - 2 * rounding(z.detach(), base.y)[:, None]
        normal = torch.zeros_like(x.detach()).flatten(1)
        shortest, excess = torch.full_like(normal[:, 0], torch.inf), torch.zeros_like(normal[:, 0])
        for k in range(gap.shape[1]):
            slope = input_gradient(gap[:, k], x, retain=k + 1 < gap.shape[1])
            if slope is None:
                raise not_differentiable(base.model)
            value, w = gap[:, k].detach(), slope.flatten(1)
            if gap.shape[1] == 1:
                return value.to(w.dtype), w
            value = value.to(w.dtype)
            _, away = toward(x_adv.detach().flatten(1), w, value, self.threat.norm, self.threat.bounds)
            nearer = away < shortest
            shortest, excess = torch.where(nearer, away, shortest), torch.where(nearer, value, excess)
            normal = torch.where(nearer[:, None], w, normal)
        return excess, normal

    def _step(self, x: Image, x_adv: Image, excess: PerSample, w: Tensor) -> Image:
        """Step from x' to the plane and beyond it, drawn towards the point where it is nearest to x."""
        norm, bounds = self.threat.norm, self.threat.bounds
        here, home = x_adv.detach().flatten(1), x.flatten(1)
        d1 = to_hyperplane(here, w, excess, norm, bounds)
        d2 = to_hyperplane(home, w, excess + (w * (home - here)).sum(dim=1), norm, bounds)
        tiny = 1e-8 * (bounds[1] - bounds[0])
        from_here, from_home = (length(d, norm).clamp_min(tiny) for d in (d1, d2))
        alpha = (from_here / (from_here + from_home)).clamp_max(self.alpha_max)[:, None]
        mixed = torch.add(here, d1, alpha=self.eta).lerp_(torch.add(home, d2, alpha=self.eta), alpha)
        return mixed.clamp_(*bounds).reshape(x.shape)


def _sides(logits: Logits, y: Label) -> tuple[Tensor, Tensor]:
    """Return which are misclassified by more than rounding, and which are that or on the boundary: two (B,) bool.

    A point on the boundary goes back like one beyond it: its step to the boundary is 0, so that it would never move.
    """
    lead = margin(logits, y)
    return lead > rounding(logits, y), lead >= -rounding(logits, y)


def _wrong_classes(y: Label, num_classes: int) -> Tensor:
    """Return the wrong classes of each sample, (B, K - 1)."""
    return (y[:, None] + torch.arange(1, num_classes, device=y.device)) % num_classes
