"""Attack by Auto-PGD: gradient ascent with momentum that halves its own step size, so that it has nothing to tune."""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from unmoved.attacks.apgd_steps import MomentumSteps, SparseSteps
from unmoved.attacks.call_signature import takes_images
from unmoved.attacks.gradients import Best, attacking, broken, crossed, gradient_at, value_at
from unmoved.attacks.relu_backward import smoothed
from unmoved.attacks.rounds import Retired, Round, compacts, in_rounds
from unmoved.core import noise
from unmoved.core.batch import Batch, Image, per_image
from unmoved.core.errors import UnmovedError, flag_field, keep_field, number_field, require_seed, whole_field
from unmoved.core.precision import float32_only
from unmoved.core.preconditions import require_loss
from unmoved.core.protocols import Term
from unmoved.core.threat import ThreatModel, require_threat
from unmoved.core.views import Views
from unmoved.terms import CE


@dataclass(frozen=True)
class APGD:
    """Auto-PGD (Croce and Hein 2020, algorithm 1; for l1, Croce and Hein 2021, algorithm 1).

    ``z = P(x + s g)``, ``x <- P(x + 0.75 (z - x) + 0.25 (x - x_old))`` with ``g`` the steepest direction, ``P`` the
    projection and ``s`` starting at 2 eps; at each checkpoint s is halved, and the iterate goes back to the best
    point, where the loss rose in less than 75 % of the steps or neither s nor the best loss changed since the last.
    In l1 the step is sparse, at first over 20 % of the pixels, then as the best point found suggests; there is no
    momentum.

    Args:
        threat: the ball.
        loss: the term to maximise.
        steps: number of gradient steps (100 in AutoAttack).
        restarts: independent starts; a success is final.
        targets: aim in turn at this many wrong classes, by falling clean logit (9 in AutoAttack), with a loss that
            reads ``views.target``; 0 for an untargeted loss.
        until_broken: leave a sample as soon as it is misclassified, rather than go on to the highest loss.
        draws: passes that each gradient is averaged over, for randomised models (20 in AutoAttack's ``rand``).
        large_first: in l1, 30 % of the steps in the ball of 3 eps, 30 % in that of 2 eps, the rest in that of eps.
        compat: count the rise of the first step from 0, as the authors' code does.
        seed: keys the starts.
        smooth: alpha of a softplus whose derivative stands in for ReLU's, 0 for none; see `relu_backward.smoothed`.

    Raises:
        UnmovedError: a value outside its bounds.

    Deviations: the first checkpoint counts the rise of the first step from the start's loss (see ``compat``). In l2 and
    l1 a step's length counts only pixels that the box lets move, and the projection in l2 accounts for the box. Under
    autocast a success is confirmed in float32, and the last tenth of the steps is taken in float32.
    """

    threat: ThreatModel
    loss: Term = CE("adv")
    steps: int = 100
    restarts: int = 1
    targets: int = 0
    until_broken: bool = False
    draws: int = 1
    large_first: bool = False
    compat: bool = False
    seed: int = 0
    smooth: float = 0.0

    def __post_init__(self) -> None:
        require_threat("APGD.threat", self.threat)
        require_loss("APGD.loss", self.loss)
        number_field(self, "APGD.smooth", at_least=0)
        for name, least in (("steps", 1), ("restarts", 1), ("targets", 0), ("draws", 1)):
            whole_field(self, f"APGD.{name}", at_least=least)
        keep_field(self, "APGD.seed", require_seed)
        for name in ("until_broken", "large_first", "compat"):
            flag_field(self, f"APGD.{name}")
        if self.large_first and self.threat.norm != "l1":
            raise UnmovedError(f"APGD.large_first: expected the norm l1, came {self.threat.norm}; leave it out")

    @takes_images
    def __call__(self, model: nn.Module, batch: Batch) -> Image:
        # A randomised model draws from the global generator, whose state is restored.
        fork = torch.random.fork_rng(enabled=self.draws > 1)
        with attacking(model, batch, self.threat) as views, smoothed(self.smooth), fork:
            if self.threat.radius == 0 or len(batch) == 0:
                return views.x.clone()
            return in_rounds(
                views, self.restarts, self.targets, self._start, self._climb, until_broken=self.until_broken
            )

    def _start(self, batch: Batch, each: Round) -> Image:
        """Draw on the surface of the ball: noise over its largest value (linf) or length (l2), or projected (l1)."""
        shape = tuple(batch.x.shape[1:])
        key = {"seed": self.seed, "step": batch.step, "stream": each.stream}
        if self.threat.norm == "linf":
            delta = noise.uniform(batch.index, shape, **key) * 2 - 1
            delta = delta / per_image(delta.flatten(1).abs().amax(dim=1), delta).clamp_min(1e-12)
        elif self.threat.norm == "l2":
            delta = self.threat.steepest(noise.normal(batch.index, shape, **key))
        else:
            ball, (low, high) = self._phases()[0][0], self.threat.bounds
            delta = (high - low) * noise.normal(batch.index, shape, **key)
            # Nearly every direction ends well outside the ball, and after this line all do, so they project onto it.
            delta = delta * per_image(4 * ball.radius / delta.flatten(1).abs().sum(dim=1), delta).clamp_min(1)
            return ball.project(batch.x + delta.to(batch.x.dtype), batch.x)
        return self.threat.project(batch.x + self.threat.radius * delta.to(batch.x.dtype), batch.x)

    def _phases(self) -> list[tuple[ThreatModel, int]]:
        """Return the balls and the number of steps in each; the last is the threat model's own."""
        if not self.large_first:
            return [(self.threat, self.steps)]
        first = math.ceil(0.3 * self.steps)
        sizes = ((3.0, first), (2.0, first), (1.0, self.steps - 2 * first))
        return [(replace(self.threat, eps=factor * self.threat.radius), steps) for factor, steps in sizes if steps > 0]

    def _climb(self, base: Views, x_adv: Image, retired: Retired | None) -> Best:
        *larger, (threat, steps) = self._phases()
        for ball, count in larger:
            x_adv = self._climb_in(ball, count, base, ball.project(x_adv, base.x), None).stepper.top
        return self._climb_in(threat, steps, base, threat.project(x_adv, base.x) if larger else x_adv, retired).best

    def _climb_in(self, threat: ThreatModel, steps: int, base: Views, x_adv: Image, retired: Retired | None) -> _Ascent:
        ascent = _Ascent(self, threat, steps, base, x_adv)
        for step in range(steps):
            finish = torch.is_autocast_enabled(x_adv.device.type) and step >= steps - max(steps // 10, 1)
            with float32_only(x_adv.device) if finish else nullcontext():
                ascent.step(step)
            if retired is not None and compacts(x_adv.device, step):
                ascent.drop(retired)
            if len(ascent.position) == 0:
                break
        ascent.confirm()
        return ascent


class _Ascent:
    """Climb from the first iterates, leaving out rows that are done; keep the best proposal of every row."""

    def __init__(self, attack: APGD, threat: ThreatModel, steps: int, base: Views, x_adv: Image) -> None:
        self.attack, self.base, self.all_rows, self.steps = attack, base, base, steps
        self.sure = torch.zeros_like(base.y, dtype=torch.bool)
        self.position = torch.arange(len(x_adv), device=x_adv.device)
        self.best = Best()
        self.x_adv = x_adv
        value, self.gradient, logits = gradient_at(base, x_adv, attack.loss, attack.draws)
        self._offer(value, logits)
        common = (threat, base.x, x_adv, value, self.gradient, steps)
        self.stepper: SparseSteps | MomentumSteps
        if threat.norm == "l1":
            self.stepper = SparseSteps(*common, given=attack.large_first)
        else:
            self.stepper = MomentumSteps(*common, attack.compat)

    def _offer(self, value: Tensor, logits: Tensor) -> None:
        self.best.offer(self.x_adv, value, crossed(logits, self.base.y), self.position)

    def step(self, step: int) -> None:
        """Take one step, and offer the iterate, the final one included, to the best."""
        self.x_adv = self.stepper.move(self.x_adv, self.gradient, step)
        if step == self.steps - 1 and self.attack.draws == 1:
            value, logits = value_at(self.base, self.x_adv, self.attack.loss)
            self.stepper.note(self.x_adv, value, self.gradient)
            self._offer(value, logits)
            return
        value, self.gradient, logits = gradient_at(self.base, self.x_adv, self.attack.loss, self.attack.draws)
        self._offer(value, logits)
        self.x_adv, self.gradient = self.stepper.observe(self.x_adv, value, self.gradient, step)

    def confirm(self) -> None:
        """Under autocast, keep a success only where float32 confirms it; not at each step, since it waits for a GPU."""
        if not torch.is_autocast_enabled(self.x_adv.device.type) or self.best.x is None:
            return
        rows = torch.nonzero(self.best.wrong & ~self.sure).flatten()
        if len(rows):
            self.best.wrong[rows] = broken(self.all_rows.model, self.best.x[rows], None, self.all_rows.y[rows])
            self.sure = self.best.wrong.clone()

    def drop(self, retired: Retired) -> None:
        """Leave the rows that are done out of further steps."""
        self.confirm()
        keep = ~retired(self.best.wrong[self.position], self.position)
        if not keep.all():
            self.base, self.position = self.base.take(keep), self.position[keep]
            self.x_adv, self.gradient = self.x_adv[keep], self.gradient[keep]
            self.stepper.take(keep)
