"""Detect catastrophic overfitting: training accuracy still rises while robustness on held-out data collapses."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from unmoved.training.log import EpochRecord

GO_ON, STOP, GO_BACK = "go_on", "stop", "go_back"
RULES = (GO_ON, STOP, GO_BACK)
RECENT = 5  # epochs that an epoch is compared with
FAR, NEAR = 0.10, 0.02  # loss of robust accuracy that is a fall, and up to which an epoch still counts as good


@dataclass(frozen=True)
class Fall:
    """The last good epoch, and the epoch in which robust accuracy fell."""

    before: EpochRecord
    now: EpochRecord

    def words(self, rule: str, back_to: int | None) -> str:
        """Say in one sentence what happened, what is done about it by ``rule``, and what to do.

        Args:
            back_to: the epoch whose weights are restored; None if none are kept.
        """
        before, now = self.before, self.now
        taken = "" if back_to is None else f"the weights of epoch {back_to} are taken up again, "
        done = {
            GO_ON: "training goes on",
            STOP: f"{taken}training stops",
            GO_BACK: f"{taken}training goes on" if taken else "no good epoch is kept, training goes on",
        }[rule]
        other = '; or on_overfitting = "stop" or "go_back"' if rule == GO_ON else ""
        return (
            f"catastrophic overfitting in epoch {now['epoch']}: under the attack of the validation accuracy fell from "
            f"{before['validation_robust']:.1%} (epoch {before['epoch']}) to {now['validation_robust']:.1%}, while in "
            f"training it rose from {before['train_accuracy']:.1%} to {now['train_accuracy']:.1%}: the model has "
            f"learned to hide from the attack that it is trained by; {done}; try more attack steps, stronger noise "
            f"(NFGSM) or a smaller rate{other}"
        )


def recent(log: Sequence[EpochRecord]) -> list[EpochRecord]:
    """Return the epochs that the next one is compared with: the last few since a fall, and the one restored then."""
    since: list[EpochRecord] = []
    for record in log:
        if "overfitting" in record:
            back_to = record.get("back_to")
            since = [good for good in log if good["epoch"] == back_to]
        elif "validation_robust" in record:
            since.append(record)
    return since[-RECENT:]


def reference(log: Sequence[EpochRecord]) -> EpochRecord | None:
    """Return the best of `recent` by robust accuracy on held-out data, the last in a tie; None if there is none."""
    return max(reversed(recent(log)), key=lambda record: record["validation_robust"], default=None)


def fall(log: Sequence[EpochRecord], record: EpochRecord) -> Fall | None:
    """Return the fall in an epoch, or None.

    Robust accuracy on held-out data lies below the best of the last few epochs by 10 points, or by more than half, and
    by twice the standard error of the difference; training accuracy, under the training's attack, rose since then. With
    averaged weights a fall takes a few epochs, so that comparing with the last epoch alone would miss it. A fall from
    the accuracy of predicting one class always is not counted: such a network has not learned anything yet.

    Args:
        log: the epochs before.
        record: the epoch's, with its validation.
    """
    before = reference(log)
    if before is None or "validation_robust" not in record:
        return None
    was, now = before["validation_robust"], record["validation_robust"]
    n = record["validation_n"]
    if was - 2 * math.sqrt(was * (1 - was) / n) <= record.get("validation_chance", 0.0):
        return None
    error = math.sqrt((was * (1 - was) + now * (1 - now)) / n)
    is_far = (was - now >= FAR or now < was / 2) and was - now > 2 * error
    return Fall(before, record) if is_far and record["train_accuracy"] > before["train_accuracy"] else None


def is_good(log: Sequence[EpochRecord], record: EpochRecord) -> bool:
    """Return whether an epoch may be restored later: it is hardly worse than the best of the last few."""
    before = reference(log)
    return before is None or record.get("validation_robust", 0.0) >= before["validation_robust"] - NEAR
