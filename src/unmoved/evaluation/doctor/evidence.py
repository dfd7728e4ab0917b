"""Collect what the checks share: samples, logits, gradients, and attacks, each computed once."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from unmoved.attacks import APGD, PGD
from unmoved.attacks.gradients import attacking, input_gradient
from unmoved.attacks.square import Square
from unmoved.attacks.transfer import Transfer
from unmoved.core.batch import Batch, Image, Logits, PerSample, per_image
from unmoved.core.protocols import Attack, Term
from unmoved.core.threat import ThreatModel
from unmoved.core.views import eval_logits
from unmoved.evaluation.doctor.reported import ReportedOutcomes
from unmoved.terms import CE, DLR, Margin, TargetedDLR, TargetedMargin

WEAK_STEPS = 20  # PGD-20 with cross-entropy: the attack that papers report most, and the first that masking fools
STRONG_STEPS = 100  # AutoAttack's
MORE_RESTARTS = 4
PASSES = 5  # AutoAttack's count of forward passes that must agree
DRAWS = 20  # passes whose mean logits decide if the model is random: one lucky draw is no success (AutoAttack's rand)
TARGETS, TARGET_STEPS = 3, 50  # a target beyond the third likeliest class rarely adds to the first three
QUERIES = 500
MOST = 40  # survivors that the costly attacks run on: enough to see a share of a tenth, at under half the time


@dataclass(frozen=True, eq=False)
class AttackResult:
    """Hold what an attack achieved on the samples that it was given.

    Attributes:
        batch: those samples.
        x_adv: (B, C, H, W), with the clean image in place of a proposal that is not finite.
        broken: (B,) bool, whether ``x_adv`` is misclassified.
    """

    batch: Batch
    x_adv: Image
    broken: Tensor

    @cached_property
    def rest(self) -> Batch:
        """Return the samples that survived."""
        return self.batch.take(~self.broken)

    @property
    def count(self) -> int:
        """Count the samples that were broken."""
        return int(self.broken.sum())


@dataclass(eq=False)
class Evidence:
    """Hold a model, the samples it is examined on, and the attacks that several checks read, each run once.

    The white-box attacks go from cheap to costly, each on the samples that those before it left robust.

    Attributes:
        model: in the mode in which it was given; the checks use evaluation mode unless they say otherwise.
        batch: the samples, on the model's device.
        threat: the ball.
        seed: keys the noise of all attacks.
        surrogate: another model of the same task, for transfer.
        reported: the outcomes whose worst case is the reported robust accuracy, if there are any.
        classes: the names of the classes, or none.
    """

    model: nn.Module
    batch: Batch
    threat: ThreatModel
    seed: int = 0
    surrogate: nn.Module | None = None
    reported: ReportedOutcomes | None = None
    classes: tuple[str, ...] = ()

    def logits(self, x: Image, mode: str = "eval") -> Logits:
        """Compute logits without a gradient; ``"train"`` leaves every submodule in its own mode."""
        return eval_logits(self.model, x, mode=mode)

    @cached_property
    def clean(self) -> Logits:
        return self.logits(self.batch.x)

    @cached_property
    def right(self) -> Batch:
        """Select the samples that the model gets right: only these can be lost to an attack."""
        return self.batch.take(self.clean.argmax(dim=1) == self.batch.y)

    @cached_property
    def started(self) -> Batch:
        """Move the right samples to random points of their balls, since stored pixels lie on the 8-bit grid."""
        return Batch(self.threat.start(self.right, seed=self.seed), self.right.y, self.right.index)

    @cached_property
    def is_random(self) -> bool:
        """Return whether two passes over the same images differ in evaluation mode."""
        return any(differ(self.clean, self.logits(self.batch.x)) for _ in range(PASSES - 1))

    @property
    def by_autoattack(self) -> bool:
        """Return whether the reported accuracy is under AutoAttack's standard version."""
        return self.reported is not None and self.reported.by_autoattack

    # --- gradients

    def gradient(self, batch: Batch, loss: Term) -> tuple[PerSample, Tensor] | None:
        """Compute a loss (B,) and its gradient with respect to the image; None if the model cut the graph."""
        with attacking(self.model, batch, self.threat) as base:
            x = batch.x.detach().clone().requires_grad_(True)
            value = loss(base.at(x))
            gradient = input_gradient(value, x)
            return None if gradient is None else (value.detach(), gradient)

    @cached_property
    def has_gradient(self) -> bool:
        return len(self.right) > 0 and self.gradient(self.right.take(torch.arange(1)), CE("adv")) is not None

    # --- searches

    def search(self, attack: Attack, batch: Batch) -> AttackResult:
        """Run an attack and check which of its images are misclassified."""
        if len(batch) == 0:
            return nothing(batch)
        x_adv = attack(self.model, batch)
        finite = x_adv.isfinite().flatten(1).all(dim=1)
        x_adv = torch.where(per_image(finite, x_adv), x_adv, batch.x)
        logits = eval_logits(self.model, x_adv, draws=DRAWS if self.is_random else 1)
        # The argmax of NaN is an accident, not a success.
        return AttackResult(batch, x_adv, (logits.argmax(dim=1) != batch.y) & logits.isfinite().all(dim=1))

    def climb(self, attack: Attack, batch: Batch) -> AttackResult:
        """Run `search` with a gradient attack; nothing is broken if there is no gradient."""
        return self.search(attack, batch) if self.has_gradient else nothing(batch)

    @cached_property
    def weak(self) -> AttackResult:
        """Run PGD-20 with cross-entropy."""
        return self.climb(self._pgd(CE("adv")), self.right)

    @cached_property
    def other_loss(self) -> AttackResult:
        """Run PGD-20 with the margin, which neither the scale of the logits nor a flat softmax hides."""
        return self.climb(self._pgd(Margin("adv")), self.weak.rest)

    @cached_property
    def strong(self) -> AttackResult:
        """Run APGD-100 with DLR, or with the margin if there are too few classes for DLR."""
        return self.climb(APGD(self.threat, loss=self._sharp, steps=STRONG_STEPS, seed=self.seed), self.other_loss.rest)

    @cached_property
    def restarts(self) -> AttackResult:
        """Restart APGD on at most `MOST` survivors."""
        attack = APGD(
            self.threat,
            loss=self._sharp,
            steps=STRONG_STEPS,
            restarts=MORE_RESTARTS,
            until_broken=True,
            seed=self.seed + 1,
        )
        return self.climb(attack, self.strong.rest.take(torch.arange(min(len(self.strong.rest), MOST))))

    @cached_property
    def targeted(self) -> AttackResult:
        """Attack towards the likeliest wrong classes in turn, as the last of the white-box attacks."""
        classes = self.clean.shape[1]
        loss: Term = TargetedDLR() if classes > 3 else TargetedMargin()
        targets = min(TARGETS, classes - 1)
        attack = APGD(self.threat, loss, TARGET_STEPS, targets=targets, until_broken=True, seed=self.seed)
        return self.climb(attack, self.restarts.rest)

    @property
    def survivors(self) -> Batch:
        """Select at most `MOST` of the samples that survived every white-box attack."""
        return self.targeted.rest

    @cached_property
    def black_box(self) -> AttackResult:
        """Run random search on the samples that every gradient attack left robust."""
        return self.search(Square(self.threat, queries=QUERIES, seed=self.seed), self.survivors)

    @cached_property
    def transferred(self) -> AttackResult:
        """Try images made for the surrogate on the samples that every gradient attack left robust."""
        if self.surrogate is None:
            return nothing(self.survivors)
        return self.search(Transfer(self.threat, self.surrogate), self.survivors)

    @property
    def white_box(self) -> tuple[AttackResult, ...]:
        """Combine all white-box attacks."""
        return self.weak, self.other_loss, self.strong, self.restarts, self.targeted

    @property
    def scale(self) -> float:
        """Return how many samples one sample of the costly attacks stands for."""
        return len(self.strong.rest) / max(len(self.restarts.batch), 1)

    def looked_at(self, count: float) -> tuple[float, float]:
        """Return (count, number of right samples), both in samples that the costly attacks were run on.

        A sample that stands for several counts as one observation.
        """
        per = max(self.scale, 1.0)
        return count / per, len(self.right) / per

    @property
    def _sharp(self) -> Term:
        return DLR("adv") if self.clean.shape[1] > 2 else Margin("adv")

    def _pgd(self, loss: Term) -> Attack:
        if self.threat.norm == "l1":  # a PGD step in l1 moves one pixel: twenty of them prove nothing
            return APGD(self.threat, loss=loss, steps=WEAK_STEPS, seed=self.seed)
        return PGD(self.threat, loss=loss, steps=WEAK_STEPS, keep="best", seed=self.seed)


def nothing(batch: Batch) -> AttackResult:
    """Return the result of an attack that broke nothing."""
    return AttackResult(batch, batch.x, torch.zeros_like(batch.y, dtype=torch.bool))


def differ(one: Logits, other: Logits) -> bool:
    """Return whether logits differ by more than rounding may, 1e-4 of their spread (AutoAttack's tolerance)."""
    spread = float((one - one.mean(dim=1, keepdim=True)).abs().amax())
    return float((one - other).abs().amax()) > 1e-4 * spread
