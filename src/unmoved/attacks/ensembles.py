"""Ensembles: AutoAttack as its authors define it, and a cheap one of ours for every day."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from unmoved import views
from unmoved.attacks.apgd import APGD
from unmoved.attacks.fab import FAB
from unmoved.attacks.square import Square
from unmoved.errors import require_choice
from unmoved.protocols import Attack, Batch, Image
from unmoved.terms import CE, DLR, Margin, TargetedDLR, TargetedMargin
from unmoved.threat import ThreatModel
from unmoved.weights import evaluating

VERSIONS = ("standard", "rand")


@dataclass(frozen=True)
class AutoAttack:
    """AutoAttack (Croce and Hein 2020), its versions with the budgets of the authors' code.

    ``standard``: APGD on cross-entropy, APGD on the targeted DLR loss, targeted FAB, Square. linf and l2: 100 steps,
    one restart, 9 targets, 5,000 queries; l1: 5 restarts of the first, 5 targets of the second, both from large balls.
    ``rand``, for randomised models: APGD on cross-entropy and on DLR, each gradient averaged over 20 passes. Each
    attack starts from the clean image and runs on what those before it left robust; a sample is left once it is broken.
    What stays robust comes back clean.

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
        require_choice("AutoAttack.version", self.version, VERSIONS)

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
        said = []
        if num_classes < 10 and self.version == "standard" and not (self.threat.norm == "l1" and num_classes > 5):
            said.append(f"{num_classes} classes leave {num_classes - 1} targets of the usual 9")
        least = 4 if self.version == "standard" else 3
        if num_classes < least:
            said.append(f"the DLR loss needs {least} classes: the margin of the logits takes its place")
        return said

    def __call__(self, model: nn.Module, batch: Batch) -> Image:
        return in_turn(model, batch, self)[0]


@dataclass(frozen=True)
class Quick:
    """A cheap ensemble for every day: what it leaves robust is an upper bound, never to be called AutoAttack."""

    threat: ThreatModel
    seed: int = 0

    def parts(self, num_classes: int) -> dict[str, Attack]:
        ball, seed = self.threat, self.seed
        return {
            "apgd-ce": APGD(ball, steps=10, until_broken=True, seed=seed),
            "apgd-margin-t": APGD(ball, TargetedMargin(), steps=20, targets=9, until_broken=True, seed=seed),
        }

    def notes(self, num_classes: int) -> list[str]:
        return []

    def __call__(self, model: nn.Module, batch: Batch) -> Image:
        return in_turn(model, batch, self)[0]


def in_turn(model: nn.Module, batch: Batch, ensemble: AutoAttack | Quick) -> tuple[Image, Tensor]:
    """(the proposals, which part broke each sample): -1 where none did, also where the clean image is misclassified.

    Every success is checked in float32, on the whole image in the ball, before the sample is left.
    """
    x_adv = batch.x.detach().clone()
    by = torch.full_like(batch.y, -1)
    wrong, num_classes = _wrong(model, x_adv, batch.y)
    left = torch.nonzero(~wrong).flatten()
    parts: Mapping[str, Attack] = ensemble.parts(num_classes)
    for number, attack in enumerate(parts.values()):
        if len(left) == 0 or ensemble.threat.radius == 0:
            break
        few = batch.take(left)
        proposal = attack(model, few)
        won, _ = _wrong(model, proposal, few.y)
        won &= ensemble.threat.distance(proposal, few.x) <= ensemble.threat.radius + ensemble.threat.tolerance
        x_adv[left[won]], by[left[won]] = proposal[won], number
        left = left[~won]
    return x_adv, by


def _wrong(model: nn.Module, x: Image, y: Tensor) -> tuple[Tensor, int]:
    """(misclassified in float32 (B,), the number of classes)."""
    with torch.no_grad(), evaluating(model), torch.autocast(x.device.type, enabled=False):
        logits = views.logits(model, x)
    return logits.argmax(dim=1) != y, logits.shape[1]
