"""Attack by projected gradient ascent on any term, with any start and any stopping rule."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from unmoved.attacks.call_signature import takes_images
from unmoved.attacks.gradients import MODES, Best, attacking, broken, gradient_at, value_at
from unmoved.attacks.relu_backward import smoothed
from unmoved.attacks.stopping import StoppingRule
from unmoved.core import noise
from unmoved.core.batch import Batch, Image, Logits, PerSample
from unmoved.core.errors import UnmovedError, keep_field, number_field, require_choice, require_seed, whole_field
from unmoved.core.phases import Ramp, number, ramp_field
from unmoved.core.preconditions import require_callable, require_loss
from unmoved.core.protocols import FIXED_STEP, Term
from unmoved.core.threat import ThreatModel, require_threat
from unmoved.core.views import Views
from unmoved.terms import CE

STARTS = ("uniform", "gaussian", "none")
GAUSSIAN_START = 0.001


@dataclass(frozen=True)
class PGD:
    """Projected gradient ascent (Madry et al. 2018, section 2.1).

    ``x' <- project(x' + step_size * u)``, ``steps`` times, with u the steepest step of length 1 within the valid images
    along grad_x' loss (`ThreatModel.step`).

    Args:
        threat: the ball.
        loss: the term to maximise; ``KL()`` is TRADES' attack, any objective makes the attack adaptive to it.
        steps: number of gradient steps.
        step_size: length of a step; ``None`` is Madry's rule 2.5 * eps / steps.
        start: ``"uniform"`` in the ball, ``"gaussian"`` (0.001 N(0, I), in widths of the bounds: TRADES, MART) or
            ``"none"`` (the clean image, where the gradient of KL is zero up to rounding).
        restarts: independent starts; each sample keeps its best.
        stop: a stopping rule, such as the sensible or the friendly adversary.
        keep: ``"last"`` iterate (training; saves a forward pass) or ``"best"`` of all, the final one included.
        seed: keys the start together with the step and the sample's identity.
        mode: the model's mode while it is attacked, ``"eval"`` or ``"train"`` (batch statistics, not tracked).
        smooth: alpha of a softplus whose derivative stands in for ReLU's, 0 for none; see `relu_backward.smoothed`. For
            evaluation only: a network trained with it learns to resist it and no other attack (docs/performance.md,
            "Towards 95 percent").

    Raises:
        UnmovedError: a value outside its bounds.
    """

    threat: ThreatModel
    loss: Term = CE("adv")
    steps: int = 10
    step_size: float | Ramp | None = None
    start: str = "uniform"
    restarts: int = 1
    stop: StoppingRule | None = None
    keep: str = "last"
    seed: int = 0
    mode: str = "eval"
    smooth: float = 0.0
    kind = FIXED_STEP

    def __post_init__(self) -> None:
        require_threat("PGD.threat", self.threat)
        require_loss("PGD.loss", self.loss)
        whole_field(self, "PGD.steps", at_least=0)
        whole_field(self, "PGD.restarts", at_least=1)
        keep_field(self, "PGD.seed", require_seed)
        require_choice("PGD.start", self.start, STARTS)
        require_choice("PGD.keep", self.keep, ("last", "best"))
        require_choice("PGD.mode", self.mode, MODES)
        number_field(self, "PGD.smooth", at_least=0)
        if self.step_size is not None:
            ramp_field(self, "PGD.step_size", at_least=0)
        if self.stop is not None:
            require_callable("PGD.stop", self.stop, "logits, y, value, step, memory")
        if self.stop is not None and self.keep == "best":
            raise UnmovedError('PGD: a stopping rule decides which point is kept; use keep="last" with it')

    @property
    def lockstep(self) -> bool:
        """Return whether no sample stops before the others."""
        return self.stop is None

    @property
    def takes_mixed(self) -> bool:
        """Return whether only the loss uses the labels: no stopping rule, no choice among points."""
        return self.stop is None and self.keep == "last" and self.restarts == 1

    @takes_images
    def __call__(self, model: nn.Module, batch: Batch) -> Image:
        with attacking(model, batch, self.threat, self.mode) as views, smoothed(self.smooth):
            if self.threat.radius == 0 or (self.stop is not None and self.stop.inert):
                return views.x.clone()
            if self.restarts == 1:
                return self._climb(views, restart=0)
            best = Best()
            for restart in range(self.restarts):
                x_adv = self._climb(views, restart)
                self._offer(best, views, x_adv, *value_at(views, x_adv, self.loss))
            return best.x if best.x is not None else batch.x

    def _start(self, batch: Batch, restart: int) -> Image:
        if self.start == "uniform":
            return self.threat.start(batch, seed=self.seed, stream=restart)
        if self.start == "none":
            return batch.x
        low, high = self.threat.bounds
        return self._noisy(batch.x, batch, GAUSSIAN_START * (high - low), restart)

    def _climb(self, base: Views, restart: int) -> Image:
        if self.stop is not None:
            return self._climb_until(self.stop, base, restart)
        x_adv = self._start(base.batch, restart)
        best = Best()
        for _ in range(self.steps):
            value, gradient, logits = gradient_at(base, x_adv, self.loss)
            if self.keep == "best":
                self._offer(best, base, x_adv, value, logits)
            x_adv = self._step(x_adv, gradient, base.x)
        if self.keep == "best":
            self._offer(best, base, x_adv, *value_at(base, x_adv, self.loss))
        return x_adv.detach() if best.x is None else best.x

    @staticmethod
    def _offer(best: Best, base: Views, x_adv: Image, value: PerSample, logits: Logits) -> None:
        best.offer(x_adv, value, broken(base.model, x_adv, logits, base.y))

    def _step(self, x_adv: Image, gradient: Tensor, x: Image) -> Image:
        madry = 2.5 * self.threat.radius / self.steps
        step_size = madry if self.step_size is None else number("PGD.step_size", self.step_size)
        return self.threat.ascend(x_adv, gradient, step_size, x)

    def _climb_until(self, stop: StoppingRule, base: Views, restart: int) -> Image:
        """Climb over the samples that have not stopped; stopped ones are not computed again."""
        x_adv = before = self._start(base.batch, restart)
        rest = x_adv.detach().clone()
        position = torch.arange(len(rest), device=rest.device)
        memory: Tensor | None = None
        for step in range(self.steps + 1):
            loss = stop.opening if step == 0 and stop.opening is not None else self.loss
            if step < self.steps:
                value, gradient, logits = gradient_at(base, x_adv, loss)
            elif stop.undo:
                value, logits = value_at(base, x_adv, loss)
            else:
                break
            halt, memory = stop(logits, base.y, value, step, memory)
            go = torch.nonzero(~halt).flatten()  # waits for the GPU once, and not at each use of a mask
            if len(go) < len(position):
                gone = torch.nonzero(halt).flatten()
                rest[position[gone]] = (before if stop.undo else x_adv)[gone]
                base, position, x_adv = base.take(go), position[go], x_adv[go]
                memory = None if memory is None else memory[go]
                gradient = gradient[go]
            if step == self.steps or len(position) == 0:
                break
            before = x_adv
            x_adv = self._step(x_adv, gradient, base.x)
            if stop.jitter:
                x_adv = self._noisy(x_adv, base.batch, stop.jitter, -1 - (restart * self.steps + step))
        rest[position] = x_adv.detach()
        return rest

    def _noisy(self, x_adv: Image, batch: Batch, size: float, stream: int) -> Image:
        """Add Gaussian noise of this standard deviation, and project."""
        draw = noise.normal(batch.index, tuple(x_adv.shape[1:]), seed=self.seed, step=batch.step, stream=stream)
        return self.threat.project(x_adv + size * draw.to(x_adv.dtype), batch.x)


def FGSM(threat: ThreatModel, loss: Term = CE("adv")) -> PGD:  # noqa: B008 - a frozen value
    """The fast gradient sign method (Goodfellow et al. 2015): one step of length eps from the clean image.

    One step of `PGD`, which ends at the point of the ball cut by the box at which the linearised loss is highest:
    ``x + eps sign(grad_x loss)`` clipped to valid images in linf.
    """
    return PGD(threat, loss, steps=1, start="none")
