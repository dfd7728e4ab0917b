"""Auto-PGD: gradient ascent with momentum that halves its own step size, so that it has nothing to tune."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from unmoved import noise
from unmoved.attacks.ascent import Best, attacking, gradient_at, value_at
from unmoved.errors import require_number
from unmoved.protocols import Batch, Image, PerSample, Term
from unmoved.terms import CE
from unmoved.threat import ThreatModel
from unmoved.views import Views


@dataclass(frozen=True)
class APGD:
    """Auto-PGD (Croce and Hein 2020, algorithm 1).

    ``z = P(x + s g)``, ``x <- P(x + 0.75 (z - x) + 0.25 (x - x_old))`` with ``g`` the steepest direction, ``P`` the
    projection and ``s`` starting at 2 eps; at each checkpoint s is halved, and the iterate goes back to the best
    point, where the loss rose in less than 75 % of the steps or neither s nor the best loss changed since the last.

    Args:
        threat: the ball.
        loss: the term to maximise.
        steps: number of gradient steps (100 in AutoAttack).
        restarts: independent starts; a success is final.
        seed: keys the starts.

    Raises:
        UnmovedError: a value outside its bounds.

    Deviations: the first checkpoint counts the rise of the first step from the start's loss (the authors' code
    compares it with an empty slot).
    """

    threat: ThreatModel
    loss: Term = CE("adv")
    steps: int = 100
    restarts: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        require_number("APGD.steps", self.steps, at_least=1)
        require_number("APGD.restarts", self.restarts, at_least=1)

    def __call__(self, model: nn.Module, batch: Batch) -> Image:
        if self.threat.radius == 0:
            return batch.x.detach().clone()
        with attacking(model, batch, "eval") as views:
            best = Best()
            for restart in range(self.restarts):
                self._climb(views, restart, best)
            return best.x if best.x is not None else batch.x

    def _start(self, batch: Batch, restart: int) -> Image:
        """On the surface of the ball: noise divided by its own largest value (linf) or length (l2)."""
        shape = tuple(batch.x.shape[1:])
        key = {"seed": self.seed, "step": batch.step, "stream": restart}
        if self.threat.norm == "linf":
            delta = noise.uniform(batch.index, shape, **key) * 2 - 1
            delta = delta / delta.abs().amax(dim=tuple(range(1, delta.ndim)), keepdim=True).clamp_min(1e-12)
        else:
            delta = self.threat.steepest(noise.normal(batch.index, shape, **key))
        return self.threat.project(batch.x + self.threat.radius * delta.to(batch.x.dtype), batch.x)

    def _climb(self, base: Views, restart: int, best: Best) -> None:
        """Every iterate, the final one included, is offered to ``best``."""
        x = base.x
        x_adv = x_old = x_top = self._start(base.batch, restart)
        value, gradient, logits = gradient_at(base, x_adv, self.loss)
        best.offer(x_adv, value, logits, base.y)
        pace = _Pace(value, gradient, 2 * self.threat.radius, _like(x), self.steps)
        for step in range(self.steps):
            move = pace.step_size * self.threat.steepest(gradient)
            z = self.threat.project(x_adv + move, x)
            share = 0.75 if step > 0 else 1.0
            x_new = self.threat.project(x_adv + share * (z - x_adv) + (1 - share) * (x_adv - x_old), x)
            x_old, x_adv = x_adv, x_new
            if step == self.steps - 1:
                best.offer(x_adv, *value_at(base, x_adv, self.loss), base.y)
                return
            value, gradient, logits = gradient_at(base, x_adv, self.loss)
            best.offer(x_adv, value, logits, base.y)
            higher, back = pace.observe(value, gradient, step)
            x_top = torch.where(_like(x)(higher), x_adv, x_top)
            if back is not None:
                x_adv = torch.where(_like(x)(back), x_top, x_adv)
                gradient = torch.where(_like(x)(back), pace.top_gradient, gradient)


class _like:
    """Shapes (B,) values so that they broadcast over images."""

    def __init__(self, x: Tensor) -> None:
        self.tail = [1] * (x.ndim - 1)

    def __call__(self, per_sample: Tensor) -> Tensor:
        return per_sample.reshape(-1, *self.tail)


class _Pace:
    """The step size of each sample, and when to halve it (section 3.1 of the paper)."""

    def __init__(self, value: PerSample, gradient: Tensor, step_size: float, like: _like, steps: int) -> None:
        self.like = like
        self.step_size = torch.full_like(like(value), step_size)
        self.top_value, self.top_gradient = value.clone(), gradient.clone()
        self.last_value, self.rises = value, torch.zeros_like(value)
        self.checked_value, self.halved = value.clone(), torch.ones_like(value, dtype=torch.bool)
        self.interval = max(int(0.22 * steps), 1)
        self.shortest, self.shortening = max(int(0.06 * steps), 1), max(int(0.03 * steps), 1)
        self.next_check = self.interval - 1

    def observe(self, value: PerSample, gradient: Tensor, step: int) -> tuple[Tensor, Tensor | None]:
        """Which samples reached a new best (B,), and which must go back to it (B,), None between checkpoints."""
        self.rises = self.rises + (value > self.last_value)
        self.last_value = value
        higher = value > self.top_value
        self.top_value = torch.where(higher, value, self.top_value)
        self.top_gradient = torch.where(self.like(higher), gradient, self.top_gradient)
        if step != self.next_check:
            return higher, None
        oscillates = self.rises <= 0.75 * self.interval
        stuck = ~self.halved & (self.checked_value >= self.top_value)
        self.halved = oscillates | stuck
        self.step_size = torch.where(self.like(self.halved), self.step_size / 2, self.step_size)
        self.checked_value, self.rises = self.top_value.clone(), torch.zeros_like(value)
        self.interval = max(self.interval - self.shortening, self.shortest)
        self.next_check += self.interval
        return higher, self.halved
