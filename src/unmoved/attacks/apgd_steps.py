"""Choose Auto-PGD's steps: momentum and halving step sizes in linf and l2, adaptive sparsity in l1."""

from __future__ import annotations

import torch
from torch import Tensor

from unmoved.core.batch import Image, PerSample, per_image
from unmoved.core.threat import ThreatModel


class _Steps:
    """Remember the point of highest loss of each row, with its loss and gradient."""

    rows: tuple[str, ...] = ("x", "top", "top_value", "top_gradient", "step_size")

    def __init__(self, threat: ThreatModel, x: Image, x_adv: Image, value: PerSample, gradient: Tensor) -> None:
        self.threat, self.x = threat, x
        self.top, self.top_value, self.top_gradient = x_adv, value.clone(), gradient

    def take(self, keep: Tensor) -> None:
        for name in self.rows:
            setattr(self, name, getattr(self, name)[keep])

    def note(self, x_adv: Image, value: PerSample, gradient: Tensor) -> None:
        """Remember the rows whose loss is a new best."""
        higher = per_image(value > self.top_value, self.x)
        self.top_value = torch.maximum(self.top_value, value)
        self.top = torch.where(higher, x_adv, self.top)
        self.top_gradient = torch.where(higher, gradient, self.top_gradient)

    def back(self, which: Tensor, x_adv: Image, gradient: Tensor) -> tuple[Image, Tensor]:
        """Return iterate and gradient; those of the best point where ``which`` (B,) is true."""
        chosen = per_image(which, self.x)
        return torch.where(chosen, self.top, x_adv), torch.where(chosen, self.top_gradient, gradient)


def with_momentum(
    threat: ThreatModel, x: Image, x_adv: Image, x_old: Image, gradient: Tensor, size: float | Tensor, step: int
) -> Image:
    """Take a step of Auto-PGD (Croce and Hein 2020, section 3.1): ``P(x' + 0.75 (z - x') + 0.25 (x' - x_old))``.

    ``z = P(x' + s g)`` with g the steepest direction; the first step, number 0, has no momentum.

    Args:
        x: (B, C, H, W) the centres of the balls.
        x_adv, x_old: the iterates, and those before them.
        gradient: of the loss at ``x_adv``.
        size: s, one for all or (B, 1, 1, 1).
        step: its number.
    """
    z = threat.ascend(x_adv, gradient, size, x)
    share = 0.75 if step > 0 else 1.0
    return threat.project(x_adv + share * (z - x_adv) + (1 - share) * (x_adv - x_old), x)


class MomentumSteps(_Steps):
    """Choose steps and step sizes in linf and l2 (Croce and Hein 2020, sections 3.1 and 3.2)."""

    rows = (*_Steps.rows, "x_old", "last_value", "rises", "checked_value", "halved")

    def __init__(
        self, threat: ThreatModel, x: Image, x_adv: Image, value: PerSample, gradient: Tensor, steps: int, compat: bool
    ) -> None:
        super().__init__(threat, x, x_adv, value, gradient)
        self.x_old = x_adv
        self.step_size = torch.full_like(per_image(value, self.x), 2 * threat.radius, dtype=x.dtype)
        self.last_value = torch.zeros_like(value) if compat else value
        self.rises = torch.zeros_like(value)
        self.checked_value, self.halved = value.clone(), torch.ones_like(value, dtype=torch.bool)
        self.interval = max(int(0.22 * steps), 1)
        self.shortest, self.shortening = max(int(0.06 * steps), 1), max(int(0.03 * steps), 1)
        self.next_check = self.interval - 1

    def move(self, x_adv: Image, gradient: Tensor, step: int) -> Image:
        moved = with_momentum(self.threat, self.x, x_adv, self.x_old, gradient, self.step_size, step)
        self.x_old = x_adv
        return moved

    def observe(self, x_adv: Image, value: PerSample, gradient: Tensor, step: int) -> tuple[Image, Tensor]:
        """Return where to go on from: the iterate, or after a halving the best point."""
        self.rises = self.rises + (value > self.last_value)
        self.last_value = value
        self.note(x_adv, value, gradient)
        if step != self.next_check:
            return x_adv, gradient
        oscillates = self.rises <= 0.75 * self.interval
        stuck = ~self.halved & (self.checked_value >= self.top_value)
        self.halved = oscillates | stuck
        self.step_size = torch.where(per_image(self.halved, self.x), self.step_size / 2, self.step_size)
        self.checked_value, self.rises = self.top_value.clone(), torch.zeros_like(value)
        self.interval = max(self.interval - self.shortening, self.shortest)
        self.next_check += self.interval
        return self.back(self.halved, x_adv, gradient)


class SparseSteps(_Steps):
    """Choose sparse steps in l1, over as many pixels as the best point's support suggests (Croce and Hein 2021, 4).

    Pixels at the edge of the box that would move outwards do not count, neither in the support nor in the step: they
    use up no length, and the pixels of next largest gradient take their place. The first step has as many pixels as
    the support of a ``given`` start, or a share ``FIRST`` of all pixels if the start is noise.
    """

    rows = (*_Steps.rows, "count", "support")
    FIRST, SHRINK, LEAST, SPARSER = 0.2, 1.5, 10.0, 0.95

    def __init__(
        self, threat: ThreatModel, x: Image, x_adv: Image, value: PerSample, gradient: Tensor, steps: int, given: bool
    ) -> None:
        super().__init__(threat, x, x_adv, value, gradient)
        self.step_size = torch.full_like(per_image(value, self.x), threat.radius, dtype=x.dtype)
        self.features = x[0].numel()
        # The distance by which rounding may move a pixel, or keep it from an edge.
        self.least = 8 * torch.finfo(x.dtype).eps * max(abs(edge) for edge in threat.bounds)
        if given:
            self.support = self._support(x_adv)
            self.count = self._sparser_than(self.support)
        else:
            self.support = torch.full_like(value, self.features, dtype=x.dtype)
            self.count = self._whole(self.FIRST * self.support)
        self.interval = max(int(0.04 * steps), 1)

    def _support(self, x_adv: Image) -> PerSample:
        """Count the pixels that moved by more than rounding and stand at no edge; all where the ball has room."""
        (low, high), size = self.threat.bounds, (x_adv - self.x).abs()
        between = (size > self.least) & (x_adv > low + self.least) & (x_adv < high - self.least)
        is_full = size.flatten(1).sum(dim=1) > 0.99 * self.threat.radius
        return torch.where(is_full, between.flatten(1).sum(dim=1), self.features).to(self.x.dtype)

    def _whole(self, count: PerSample) -> Tensor:
        """Round down to whole pixels, one at least (the authors round up, and stay at two where one is best)."""
        return count.long().clamp(1, self.features)

    def _sparser_than(self, support: PerSample) -> Tensor:
        return self._whole(support / self.SHRINK)

    def move(self, x_adv: Image, gradient: Tensor, step: int) -> Image:
        low, high = self.threat.bounds
        size = gradient.abs()
        can_move = torch.where(gradient > 0, high - x_adv, x_adv - low) > self.least
        largest = (size * can_move).flatten(1).sort(dim=1, descending=True).values
        threshold = largest.gather(1, self.count[:, None] - 1)
        # Pixels that reached an edge are pushed further, so that the projection does not pull them back.
        pushed = (size >= per_image(threshold, self.x)) & (size > 0)
        count = per_image((pushed & can_move).flatten(1).sum(dim=1), self.x).clamp_min(1)
        return self.threat.project(x_adv + self.step_size * (gradient.sign() * pushed) / count, self.x)

    def observe(self, x_adv: Image, value: PerSample, gradient: Tensor, step: int) -> tuple[Image, Tensor]:
        """Return where to go on from: the iterate, or the best point, with the full step, where that became sparser."""
        self.note(x_adv, value, gradient)
        if (step + 1) % self.interval:
            return x_adv, gradient
        support = self._support(self.top)
        sparser = support / self.support.clamp_min(1) < self.SPARSER
        self.count, self.support = self._sparser_than(support), support
        full = self.threat.radius
        shrunk = (self.step_size / self.SHRINK).clamp(full / self.LEAST, full)
        self.step_size = torch.where(per_image(sparser, self.x), full, shrunk)
        return self.back(sparser, x_adv, gradient)
