"""Attack for instance-adaptive training: a radius for each sample, which grows while the sample stays right."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from unmoved.attacks.call_signature import takes_images
from unmoved.attacks.gradients import MODES, attacking, gradient_at, require_attackable
from unmoved.attacks.sample_memory import SampleMemory
from unmoved.core.batch import Batch, Image, per_image
from unmoved.core.errors import require_choice, require_number, require_seed, require_whole
from unmoved.core.preconditions import require_loss
from unmoved.core.protocols import Term
from unmoved.core.threat import ThreatModel, require_threat
from unmoved.core.views import eval_logits
from unmoved.terms import CE


class IAAT:
    """PGD within a radius per sample, remembered by ``Batch.index`` (Balaji et al. 2019, algorithm 1).

    A call attacks within the remembered radii. ``update`` then tries each sample's radius plus ``gamma``: right there
    -> that radius; right at the old radius -> the old one; else the old one minus ``gamma``; times "the clean image
    is right", at least 0, at most the threat's eps; ``radius <- momentum old + (1 - momentum) new``. Step size
    ``max(2 radius / steps, step_size)``.

    Args:
        threat: the ball; its eps is the radius of a sample not seen before, and the largest.
        loss: the term to maximise.
        steps: gradient steps.
        gamma: change of a radius; ``None`` is 1.9/255 (the authors' code), on images in [0, 1], and as much of the
            width of other bounds.
        step_size: smallest step; ``None`` is 2/255 (there) in the same way.
        momentum: share of the old radius that is kept (0.9 there).
        seed: keys the starts.
        mode: ``"eval"`` or ``"train"`` (the authors').

    Raises:
        UnmovedError: a value outside its bounds.

    Deviations: the radius is chosen after the step, by the model it made, so that calling stays pure; radii are
    capped at eps, so that every proposal is in the threat model. Warm-up with a common radius is a phase.
    """

    lockstep = True

    def __init__(
        self,
        threat: ThreatModel,
        loss: Term = CE("adv"),  # noqa: B008 - a frozen value
        steps: int = 10,
        gamma: float | None = None,
        step_size: float | None = None,
        momentum: float = 0.9,
        seed: int = 0,
        mode: str = "eval",
    ) -> None:
        require_threat("IAAT.threat", threat)
        require_loss("IAAT.loss", loss)
        steps = require_whole("IAAT.steps", steps, at_least=1)
        width = threat.bounds[1] - threat.bounds[0]
        gamma = 1.9 / 255 * width if gamma is None else require_number("IAAT.gamma", gamma, at_least=0)
        step_size = 2 / 255 * width if step_size is None else require_number("IAAT.step_size", step_size, at_least=0)
        momentum = require_number("IAAT.momentum", momentum, at_least=0, at_most=1)
        seed = require_seed("IAAT.seed", seed)
        require_choice("IAAT.mode", mode, MODES)
        self.threat, self.loss, self.steps, self.gamma = threat, loss, steps, gamma
        self.step_size, self.momentum, self.seed, self.mode = step_size, momentum, seed, mode
        self._memory = SampleMemory()

    def __repr__(self) -> str:
        return (
            f"IAAT({self.threat!r}, {self.loss!r}, steps={self.steps}, gamma={self.gamma!r}, "
            f"step_size={self.step_size!r}, momentum={self.momentum!r}, seed={self.seed}, mode={self.mode!r})"
        )

    def radius(self, index: Tensor) -> Tensor:
        """Return the remembered radii (B,); the threat's eps for samples not seen before."""
        return self._memory.read(index, torch.full(index.shape, self.threat.radius, device=index.device))

    def state_dict(self) -> dict[str, Tensor]:
        index, radius = self._memory.state()
        return {"index": index, "radius": radius}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self._memory.load(state["index"], state["radius"])

    @takes_images
    def __call__(self, model: nn.Module, batch: Batch) -> Image:
        require_attackable(model, batch, self.threat)
        return self._attack(model, batch, self.radius(batch.index))

    def update(self, model: nn.Module, batch: Batch, x_adv: Image) -> None:
        old = self.radius(batch.index)
        tried = (old + self.gamma).clamp_max(self.threat.radius)
        further = self._attack(model, batch, tried)
        right, right_old, right_further = (
            eval_logits(model, x).argmax(dim=1) == batch.y for x in (batch.x, x_adv, further)
        )
        new = torch.where(right_further, tried, torch.where(right_old, old, old - self.gamma))
        new = (new * right).clamp_min(0)
        self._memory.write(batch.index, self.momentum * old + (1 - self.momentum) * new)

    def _attack(self, model: nn.Module, batch: Batch, radius: Tensor) -> Image:
        step = per_image((2 * radius / self.steps).clamp_min(self.step_size), batch.x)
        with attacking(model, batch, self.threat, self.mode) as views:
            x_adv = self.threat.start(views.batch, seed=self.seed, radius=radius)
            for _ in range(self.steps):
                _, gradient, _ = gradient_at(views, x_adv, self.loss)
                x_adv = self.threat.ascend(x_adv, gradient, step.to(x_adv.dtype), views.x, radius)
            return x_adv.detach()
