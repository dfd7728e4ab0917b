"""Attack by one step from the last perturbation of the same image: FGSM with a prior-guided start."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from unmoved.attacks.call_signature import takes_images
from unmoved.attacks.gradients import MODES, attacking, gradient_at
from unmoved.attacks.sample_memory import SampleMemory
from unmoved.core import noise
from unmoved.core.batch import Batch, Image
from unmoved.core.errors import require_choice, require_number, require_seed
from unmoved.core.preconditions import require_loss
from unmoved.core.protocols import FIXED_STEP, Term
from unmoved.core.threat import ThreatModel, require_threat
from unmoved.terms import CE


class PriorFGSM:
    """One step from the perturbation that the last epoch ended with (FGSM-EP: Jia et al. 2022, arXiv 2207.08859).

    ``delta <- clip(delta + alpha sign(grad CE(x + delta)), -eps, eps)``, remembered for each sample by its identity
    and read again in the next epoch: a strong start that costs no pass, against catastrophic overfitting. A sample not
    seen before starts from a random vertex of the ball, as in the authors' code, where the perturbation also stays in
    its place while augmentation moves the image.

    Args:
        threat: the ball.
        loss: the term to maximise.
        step_size: alpha; ``None`` is eps, as in the paper.
        seed: keys the first starts together with the sample's identity.
        mode: the model's mode while it is attacked, ``"eval"`` or ``"train"`` (the authors').

    Raises:
        UnmovedError: a value outside its bounds.

    Deviations: perturbations are remembered in half precision, in units of eps. The paper is about linf; in l2 and l1
    the first start is uniform in the ball. Left out are the momentum over epochs of FGSM-MEP, which
    needs the gradient beside the image, and the regulariser, the squared distance of the logits at start and end of the
    step: a term sees the clean and the attacked image, not the start. A phase with its own table begins with an empty
    memory, which is the paper's reset.
    """

    kind = FIXED_STEP
    lockstep = True

    def __init__(
        self,
        threat: ThreatModel,
        loss: Term = CE("adv"),  # noqa: B008 - a frozen value
        step_size: float | None = None,
        seed: int = 0,
        mode: str = "eval",
    ) -> None:
        require_threat("PriorFGSM.threat", threat)
        require_loss("PriorFGSM.loss", loss)
        if step_size is not None:
            step_size = require_number("PriorFGSM.step_size", step_size, at_least=0)
        require_choice("PriorFGSM.mode", mode, MODES)
        self.threat, self.loss, self.step_size = threat, loss, step_size
        self.seed, self.mode = require_seed("PriorFGSM.seed", seed), mode
        self._memory = SampleMemory()

    def __repr__(self) -> str:
        numbers = f"step_size={self.step_size!r}, seed={self.seed}, mode={self.mode!r}"
        return f"PriorFGSM({self.threat!r}, {self.loss!r}, {numbers})"

    def start(self, batch: Batch) -> Image:
        """Return the images (B, C, H, W) that the next step on these samples starts from."""
        if self.threat.norm == "linf":
            draw = noise.uniform(batch.index, tuple(batch.x.shape[1:]), seed=self.seed)
            first = torch.where(draw < 0.5, -1.0, 1.0).to(torch.float16)
        else:
            first = self._in_radii(self.threat.start(replace(batch, step=0), seed=self.seed) - batch.x)
        delta = self._memory.read(batch.index, first).to(batch.x.dtype) * self.threat.radius
        return self.threat.project(batch.x + delta, batch.x)

    def _in_radii(self, delta: Tensor) -> Tensor:
        return (delta / self.threat.radius if self.threat.radius else torch.zeros_like(delta)).to(torch.float16)

    @takes_images
    def __call__(self, model: nn.Module, batch: Batch) -> Image:
        with attacking(model, batch, self.threat, self.mode) as views:
            start = self.start(views.batch)
            _, gradient, _ = gradient_at(views, start, self.loss)
            alpha = self.threat.radius if self.step_size is None else self.step_size
            return self.threat.ascend(start, gradient, alpha, views.x)

    def update(self, model: nn.Module, batch: Batch, x_adv: Image) -> None:
        self._memory.write(batch.index, self._in_radii(x_adv - batch.x))

    def state_dict(self) -> dict[str, Tensor]:
        index, delta = self._memory.state()
        return {"index": index, "delta": delta}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self._memory.load(state["index"], state["delta"])
