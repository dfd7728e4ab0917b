"""Attack by one step from strong noise, which leaves the ball: N-FGSM, for training and not for evaluation."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from unmoved.attacks.call_signature import takes_images
from unmoved.attacks.gradients import MODES, attacking, gradient_at
from unmoved.core.batch import Batch, Image
from unmoved.core.errors import keep_field, number_field, require_choice, require_seed
from unmoved.core.phases import Ramp, number, ramp_field
from unmoved.core.preconditions import require_loss
from unmoved.core.protocols import FIXED_STEP, Term
from unmoved.core.threat import ThreatModel, require_threat
from unmoved.terms import CE


@dataclass(frozen=True)
class NFGSM:
    """One step from unclipped noise (N-FGSM: de Jorge et al. 2022, arXiv 2202.01181, algorithm 1).

    ``x' = x + eta + alpha sign(grad CE(x + eta))`` with eta uniform in ``[-k eps, k eps]``, clipped to valid images
    alone: x' lies up to ``k eps + alpha`` from x. Training by a single step from the clean image or from noise in the
    ball may overfit catastrophically: the model learns to hide from the step. Strong noise that is never clipped to the
    ball prevents that, at the same cost.

    It leaves the ball by design (``leaves_ball``): a training step uses its images as they are; evaluation refuses it.

    Args:
        threat: the ball; its eps is the unit of the noise.
        loss: the term to maximise.
        k: size of the noise in radii, 2 in the paper.
        step_size: alpha; ``None`` is eps, as in the paper.
        seed: keys the noise together with the step and the sample's identity.
        mode: the model's mode while it is attacked, ``"eval"`` or ``"train"`` (the authors').

    Raises:
        UnmovedError: a value outside its bounds.

    Deviations: the paper is about linf; in l2 and l1 eta is uniform in the ball of radius ``k eps``, and the step is
    the steepest of length alpha.
    """

    threat: ThreatModel
    loss: Term = CE("adv")
    k: float = 2.0
    step_size: float | Ramp | None = None
    seed: int = 0
    mode: str = "eval"
    kind = FIXED_STEP
    lockstep = True
    leaves_ball = True
    takes_mixed = True

    def __post_init__(self) -> None:
        require_threat("NFGSM.threat", self.threat)
        require_loss("NFGSM.loss", self.loss)
        number_field(self, "NFGSM.k", at_least=0)
        if self.step_size is not None:
            ramp_field(self, "NFGSM.step_size", at_least=0)
        keep_field(self, "NFGSM.seed", require_seed)
        require_choice("NFGSM.mode", self.mode, MODES)

    @takes_images
    def __call__(self, model: nn.Module, batch: Batch) -> Image:
        with attacking(model, batch, self.threat, self.mode) as views:
            eps = self.threat.radius
            wide = views.x.new_full((len(views.x),), self.k * eps)
            start = self.threat.start(views.batch, seed=self.seed, radius=wide)
            _, gradient, _ = gradient_at(views, start, self.loss)
            alpha = eps if self.step_size is None else number("NFGSM.step_size", self.step_size)
            return (start + self.threat.step(start, gradient, alpha)).clamp(*self.threat.bounds)
