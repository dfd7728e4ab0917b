"""Examine an evaluated model for gradient masking and for mistakes that look like robustness.

What the grades mean
--------------------
A finding is about the reported robust accuracy: the worst case of the table of outcomes, or, without a table, any
accuracy under attack that would be reported.

- "do not believe": the doctor itself broke samples that the table calls robust, or found a fault that makes any
  robust accuracy of this model meaningless: it is random, in training mode, depends on the batch, has no gradient, a
  zero or wrong one, or logits that are not finite; it gets images in another form than it was made for; it predicts a
  constant, no better than chance, by another numbering of the classes, or never one of the classes.
- "look closer": the number may be right, but should be read together with this finding.
- "note": a fact that does not change the number.

If the number is from AutoAttack's standard version, a check whose objection is to a weaker attack than AutoAttack gets
at most its grade in `UNDER_AUTOATTACK`. Checks that are not listed there keep their grades: they find the faults above.

A share of the samples is graded by its one-sided exact 95 % bound (`confidence`), so that a few images are not enough
for a grade. A fault that one sample proves, such as a logit that is not finite, needs no more than one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace

import pandas as pd
import torch
from torch import nn

from unmoved.core.batch import Batch
from unmoved.core.errors import require_seed, require_whole
from unmoved.core.preconditions import require_labels, require_model, require_split
from unmoved.core.protocols import Split
from unmoved.core.threat import ThreatModel, require_threat
from unmoved.evaluation import judge
from unmoved.evaluation.doctor import classes, gradients, outcomes_table, outputs, preprocessing, searches
from unmoved.evaluation.doctor.evidence import Evidence
from unmoved.evaluation.doctor.finding import GRADES, LOOK_CLOSER, NOTE, Finding
from unmoved.evaluation.doctor.reported import ReportedOutcomes

ORDER = "examine(model, split, threat)"
Check = Callable[[Evidence], Finding | None]
# Checks of the model itself, before any attack.
OUTPUTS: tuple[Check, ...] = (
    outputs.mode,
    outputs.stochastic,
    outputs.companions,
    outputs.probabilities,
    preprocessing.normalisation,
    preprocessing.arrangement,
    classes.constant,
    classes.names,
    classes.luck,
    classes.lost_clean,
)
# Checks of gradients and attacks, which need samples that the model gets right.
ATTACKED: tuple[Check, ...] = (
    gradients.existing,
    gradients.finite,
    gradients.vanishing,
    gradients.honest_slope,
    searches.whole_box,
    searches.other_loss,
    searches.stronger_search,
    searches.more_restarts,
    searches.still_rising,
    searches.rounding,
    searches.black_box,
    searches.transfer,
    classes.lost_under_attack,
    outcomes_table.pgd_overrates,
    outcomes_table.gradient_free_wins,
    outcomes_table.table_is_weak,
)
# The gravest grade of these checks if AutoAttack's standard version gave the number: its parts do not depend on PGD,
# restarts, the number of steps or the scale of the logits, and the last of them (Square) needs no gradients.
UNDER_AUTOATTACK = {
    "PGD overrates": NOTE,
    "a stronger search wins": NOTE,
    "restarts still matter": NOTE,
    "loss still rising": NOTE,
    "saturated logits": NOTE,
    "bounded outputs": NOTE,
    "probabilities": LOOK_CLOSER,
    "fails at eps = 1": LOOK_CLOSER,
    "black-box stronger": LOOK_CLOSER,
    "transfer stronger": LOOK_CLOSER,
    "undone by 8 bits": LOOK_CLOSER,
}


def examine(
    model: nn.Module,
    split: Split,
    threat: ThreatModel,
    *,
    outcomes: pd.DataFrame | None = None,
    attacks: Mapping[str, object] | None = None,
    surrogate: nn.Module | None = None,
    n: int = 100,
    seed: int = 0,
    progress: Callable[[float, float, str], None] | None = None,
) -> list[Finding]:
    """Return reasons not to believe the robust accuracy of a model, the gravest first; none if no check objects.

    Args:
        model: images (B, C, H, W) in [0, 1] -> logits (B, K), in the mode in which it is evaluated: a model that is
            given in training mode is reported if that changes its outputs. Everything else is checked in
            evaluation mode. The model is left as it was.
        split: the data that the accuracy is about.
        threat: the threat model that the accuracy is about.
        outcomes: the table of `unmoved.evaluate` whose worst case is the reported accuracy. The checks read from it how
            PGD and attacks without gradients did and what became of each class, and compare it with their own attacks.
        attacks: the attacks of that table, name -> attack (or what `reported.kinds_in` takes in its place); one left
            out is known by its name.
        surrogate: another model of the same task, for a transfer attack.
        n: number of samples, drawn from the split by ``seed``.
        seed: keys all noise; the caller's random state is left alone.
        progress: called with (checks done, checks in all, name of the current check).

    Raises:
        UnmovedError: arguments that are no model, split and threat model; no data; images out of range; a model
            that returns no logits (B, K); labels beyond the logits; outcomes that `outcomes.by_sample` refuses.
    """
    require_model(model, ORDER)
    require_split(split, ORDER)
    require_threat("threat", threat)
    n, seed = require_whole("n", n, at_least=1), require_seed("seed", seed)
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    # A randomised model draws from the global generator: fix its draws, and restore the caller's state afterwards.
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        reported = None if outcomes is None else ReportedOutcomes(outcomes, attacks or {})
        evidence = _evidence(model, split, threat, n, seed, surrogate, reported)
        plan, findings = _plan(evidence), []
        for done, check in enumerate(plan):
            if progress is not None:
                progress(done, len(plan), check.__name__.replace("_", " "))
            found = check(evidence)
            findings += [] if found is None else [_about_the_number(found, evidence)]
        if progress is not None:
            progress(len(plan), len(plan), "done")
    return sorted(findings, key=lambda finding: GRADES.index(finding.grade))


def _evidence(
    model: nn.Module,
    split: Split,
    threat: ThreatModel,
    n: int,
    seed: int,
    surrogate: nn.Module | None,
    reported: ReportedOutcomes | None = None,
) -> Evidence:
    """Shuffle the samples, since classes may be stored one after the other, and check the images as the judge does."""
    batch = next(judge.checked_batches(model, _Shuffled(split, seed), min(n, len(split)), threat))
    named = tuple(str(name) for name in getattr(split, "classes", ()))
    evidence = Evidence(model, batch, threat, seed, surrogate, reported, named)
    require_labels(batch.y, evidence.clean.shape[1])
    return evidence


def _plan(evidence: Evidence) -> list[Check]:
    """Choose the checks; leave out an attack whose result the table already holds."""
    reported = evidence.reported
    if not evidence.clean.isfinite().all():
        return [gradients.finite]
    if len(evidence.right) == 0:
        return list(OUTPUTS)
    known = {searches.black_box} if reported is not None and reported.has_both_kinds else set()
    known |= {searches.other_loss} if reported is not None and reported.has_weak else set()
    return [*OUTPUTS, *(check for check in ATTACKED if check not in known)]


def _about_the_number(finding: Finding, evidence: Evidence) -> Finding:
    """Lower the grade of an objection to a weaker attack than those behind the reported accuracy."""
    most = UNDER_AUTOATTACK.get(finding.check) if evidence.by_autoattack else None
    if most is None or GRADES.index(finding.grade) >= GRADES.index(most):
        return finding
    return replace(finding, grade=most)


class _Shuffled:
    """Present a split in another order."""

    def __init__(self, split: Split, seed: int) -> None:
        self.split, self.seed = split, seed

    num_classes = property(lambda self: self.split.num_classes)
    shape = property(lambda self: self.split.shape)

    def __len__(self) -> int:
        return len(self.split)

    def batches(self, size: int, *, shuffle: int | None = None) -> Iterator[Batch]:
        return self.split.batches(size, shuffle=self.seed if shuffle is None else shuffle)
