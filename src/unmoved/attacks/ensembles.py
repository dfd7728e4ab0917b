"""Run several attacks in turn: AutoAttack as its authors define it, and a cheap ensemble of ours for every day."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from unmoved.attacks.apgd import APGD
from unmoved.attacks.boundary_distance import DistanceEstimator
from unmoved.attacks.call_signature import takes_images
from unmoved.attacks.fab import FAB
from unmoved.attacks.fmn import FMN
from unmoved.attacks.gradients import require_attackable
from unmoved.attacks.odi import DiversifiedPGD
from unmoved.attacks.square import Square
from unmoved.core.batch import Batch, Image
from unmoved.core.errors import keep_field, number_field, require_choice, require_seed
from unmoved.core.preconditions import require_labels
from unmoved.core.protocols import Attack
from unmoved.core.threat import ThreatModel, require_threat
from unmoved.core.views import eval_logits
from unmoved.terms import CE, DLR, Margin, TargetedDLR, TargetedMargin

VERSIONS = ("standard", "rand")
# Estimated distance of the boundary, in units of eps, beyond which long attacks break next to nothing.
NEARER = 1.5


@dataclass(frozen=True)
class AutoAttack:
    """AutoAttack (Croce and Hein 2020), with the versions and budgets of the authors' code.

    ``standard``: APGD on cross-entropy, APGD on the targeted DLR loss, targeted FAB, Square. linf and l2: 100 steps,
    one restart, 9 targets, 5,000 queries; l1: 5 restarts of the first, 5 targets of the second, both from large balls.
    ``rand``, for randomised models: APGD on cross-entropy and on DLR, each gradient averaged over 20 passes. Each
    attack starts from the clean image and runs on the samples that those before it left robust. The clean image is
    returned for samples that stay robust.

    Args:
        threat: the ball.
        version: ``"standard"`` or ``"rand"``.
        seed: keys all noise.

    Raises:
        UnmovedError: an unknown version.

    Deviations: fewer than ten classes have fewer targets; fewer than four have no targeted DLR loss and fewer than
    three none at all, so margins take their place, which `notes` says. Noise is drawn per sample; APGD counts its
    first rise from the start's loss.
    """

    threat: ThreatModel
    version: str = "standard"
    seed: int = 0

    def __post_init__(self) -> None:
        require_threat("AutoAttack.threat", self.threat)
        require_choice("AutoAttack.version", self.version, VERSIONS)
        keep_field(self, "AutoAttack.seed", require_seed)

    def parts(self, num_classes: int) -> dict[str, Attack]:
        ball, seed, few = self.threat, self.seed, num_classes < 4
        if self.version == "rand":
            untargeted = ("apgd-margin", Margin()) if num_classes < 3 else ("apgd-dlr", DLR())
            return {
                name: APGD(ball, loss, until_broken=True, draws=20, seed=seed)
                for name, loss in (("apgd-ce", CE("adv")), untargeted)
            }
        sparse = ball.norm == "l1"
        targeted = TargetedMargin() if few else TargetedDLR()
        return {
            "apgd-ce": APGD(ball, restarts=5 if sparse else 1, until_broken=True, large_first=sparse, seed=seed),
            "apgd-margin-t" if few else "apgd-t": APGD(
                ball, targeted, targets=5 if sparse else 9, until_broken=True, large_first=sparse, seed=seed
            ),
            "fab-t": FAB(ball, targets=9, until_broken=True, seed=seed),
            "square": Square(ball, seed=seed),
        }

    def notes(self, num_classes: int) -> list[str]:
        sentences = []
        if num_classes < 10 and self.version == "standard" and not (self.threat.norm == "l1" and num_classes > 5):
            sentences.append(f"{num_classes} classes leave {num_classes - 1} targets of the usual 9")
        least = 4 if self.version == "standard" else 3
        if num_classes < least:
            sentences.append(f"the DLR loss needs {least} classes: the margin of the logits takes its place")
        return sentences

    @takes_images
    def __call__(self, model: nn.Module, batch: Batch) -> Image:
        return in_turn(model, batch, self.threat, self.parts)


@dataclass(frozen=True)
class Quick:
    """A cheap ensemble for every day; its robust accuracy is an upper bound, and not to be reported as AutoAttack's.

    First a few steps of PGD on the margin; then a short FMN with gradients through dead ReLUs estimates how far the
    boundary is (`DistanceEstimator`). Samples whose boundary lies within ``reach`` eps are attacked by PGD from
    output-diversified starts, through dead ReLUs and towards four classes, and by APGD; those within `NEARER` eps also
    with more starts and more steps.

    Args:
        threat: the ball.
        reach: largest estimated distance of the boundary, in units of eps, at which a sample is attacked further.
        seed: keys all noise.

    Raises:
        UnmovedError: a reach below 1.
    """

    threat: ThreatModel
    reach: float = 1.75
    seed: int = 0

    def __post_init__(self) -> None:
        require_threat("Quick.threat", self.threat)
        number_field(self, "Quick.reach", at_least=1)
        keep_field(self, "Quick.seed", require_seed)

    def parts(self, num_classes: int) -> dict[str, Attack]:
        ball, seed = self.threat, self.seed
        nearer = min(self.reach, NEARER)
        targeted = TargetedMargin()
        ladder = (
            (self.reach, DiversifiedPGD(ball, restarts=2, smooth=10, seed=seed)),
            (self.reach, DiversifiedPGD(ball, targeted, targets=4, seed=seed + 1)),
            (self.reach, APGD(ball, until_broken=True, seed=seed)),
            (nearer, DiversifiedPGD(ball, restarts=4, seed=seed + 2)),
            (nearer, DiversifiedPGD(ball, targeted, steps=50, targets=3, seed=seed + 3)),
        )
        return {
            "pgd-margin": DiversifiedPGD(ball, steps=10, start_steps=0, seed=seed),
            "near": Near(distance_estimator(ball), ladder),
        }

    def notes(self, num_classes: int) -> list[str]:
        return []

    @takes_images
    def __call__(self, model: nn.Module, batch: Batch) -> Image:
        return in_turn(model, batch, self.threat, self.parts)


def distance_estimator(threat: ThreatModel) -> DistanceEstimator:
    """Return the estimator that `Quick` uses: a few steps of FMN, with gradients through dead ReLUs."""
    return DistanceEstimator(threat, FMN(threat, steps=20, smooth=10))


@dataclass(frozen=True)
class Near:
    """Run attacks in turn, each only on samples whose estimated distance to the boundary is small enough.

    Each sample is compared with a fixed limit and not with the other samples, so that its outcome does not depend on
    the batch.

    Args:
        estimator: estimates the distances; the images that it finds may already break a sample.
        attacks: pairs (limit, attack): the attack runs where the distance is at most this many eps.
    """

    estimator: DistanceEstimator
    attacks: tuple[tuple[float, Attack], ...]

    @takes_images
    def __call__(self, model: nn.Module, batch: Batch) -> Image:
        threat = self.estimator.threat
        require_attackable(model, batch, threat)
        x_adv = batch.x.detach().clone()
        if len(batch) == 0 or threat.radius == 0:
            return x_adv
        distance, in_ball = self.estimator(model, batch)
        won = _has_broken(model, in_ball, batch, threat)
        x_adv[won], distance[won] = in_ball[won], torch.inf
        for limit, attack in self.attacks:
            near = torch.nonzero(distance <= limit).flatten()
            if len(near):
                proposal, won = _tried(model, batch.take(near), threat, attack)
                x_adv[near[won]], distance[near[won]] = proposal[won], torch.inf
        return x_adv


def in_turn(
    model: nn.Module, batch: Batch, threat: ThreatModel, parts_of: Callable[[int], Mapping[str, Attack]]
) -> Image:
    """Run attacks in turn; return the clean image where none broke the sample or it is misclassified already.

    A sample counts as broken, and is not attacked again, only after its image was checked in float32 and in the ball.
    """
    require_attackable(model, batch, threat)
    x_adv = batch.x.detach().clone()
    wrong, num_classes = _wrong(model, x_adv, batch.y)
    left = torch.nonzero(~wrong).flatten()
    for attack in parts_of(num_classes).values():
        if len(left) == 0 or threat.radius == 0:
            break
        proposal, won = _tried(model, batch.take(left), threat, attack)
        x_adv[left[won]] = proposal[won]
        left = left[~won]
    return x_adv


def _tried(model: nn.Module, batch: Batch, threat: ThreatModel, attack: Attack) -> tuple[Image, Tensor]:
    """Return an attack's proposals, and which of them are successes."""
    proposal = attack(model, batch)
    return proposal, _has_broken(model, proposal, batch, threat)


def _has_broken(model: nn.Module, proposal: Image, batch: Batch, threat: ThreatModel) -> Tensor:
    """Return which proposals are misclassified in float32 and in the ball, (B,) bool."""
    wrong, _ = _wrong(model, proposal, batch.y)
    return wrong & (threat.distance(proposal, batch.x) <= threat.radius + threat.tolerance)


def _wrong(model: nn.Module, x: Image, y: Tensor) -> tuple[Tensor, int]:
    """Return which images are misclassified in float32, (B,) bool, and the number of classes."""
    logits = eval_logits(model, x)
    require_labels(y, logits.shape[1])
    return logits.argmax(dim=1) != y, logits.shape[1]
