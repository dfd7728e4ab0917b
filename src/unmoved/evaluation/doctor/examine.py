"""Examine an evaluated model for gradient masking and for mistakes that look like robustness.

What the grades mean
--------------------
A finding speaks about the number shown: the worst case of the table of outcomes, or whatever accuracy under attack
would be reported where there is none.

- "do not believe": the doctor itself broke samples that the table calls robust, or found a fault that voids any verdict
  on this model: it is random, in training mode, depends on the batch, has no gradient, a zero or wrong one, or logits
  that are not finite; it sees other images than it was made for; it predicts a constant, no better than chance, under
  other names of the classes, or never one of the classes.
- "look closer": the number may be right, and something beside it should be known.
- "note": what is true and does not touch the number.

On a verdict by AutoAttack's standard version `UNDER_AUTOATTACK` has the gravest grade of each check whose objection is
to a weaker attack than those behind the number. Checks that are not in it keep their grades: they are about the faults
above.

A grade that rests on a share of the samples is that of the share's one-sided exact 95 % bound (`confidence`): a few
images cannot accuse a model. What one sample proves, such as a logit that is not finite, needs no more.
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
from unmoved.evaluation.doctor.verdict import Verdict

ORDER = "examine(model, split, threat)"
Check = Callable[[Evidence], Finding | None]
# What the model is, before anything is attacked.
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
# What its gradients and searches say; they need samples that the model gets right.
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
    outcomes_table.blind_wins,
    outcomes_table.table_is_weak,
)
# The gravest grade on a verdict by AutoAttack. PGD, restarts, steps and the scale of the logits are what its parts do
# not depend on; that gradients mislead leaves its last part, which needs none.
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
            handed over in training mode is told so where that changes its outputs. Everything else is checked in
            evaluation mode. Left as it was found.
        split: the data that the accuracy is about.
        threat: the ball that it is about.
        outcomes: the table of `unmoved.evaluate` whose worst case is the number shown: what it says of PGD, of attacks
            without gradients and of the classes is read from it, and it is held against the searches made here.
        attacks: the attacks of that table, name -> attack (or what `verdict.kinds_in` takes in its place); those left
            out are taken for what their names say.
        surrogate: another model of the same task, for a transfer attack.
        n: number of samples, drawn from the split by ``seed``.
        seed: of all noise; the caller's random state is left alone.
        progress: called with (checks done, checks in all, the check at work).

    Raises:
        UnmovedError: arguments that are no model, split and threat model; no data; images out of range; a model
            that returns no logits (B, K); labels beyond the logits; outcomes that `outcomes.by_sample` refuses.
    """
    require_model(model, ORDER)
    require_split(split, ORDER)
    require_threat("threat", threat)
    n, seed = require_whole("n", n, at_least=1), require_seed("seed", seed)
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    # A randomised model draws from the global generator: its draws are fixed, and the caller's state is put back.
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        verdict = None if outcomes is None else Verdict(outcomes, attacks or {})
        evidence = _evidence(model, split, threat, n, seed, surrogate, verdict)
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
    verdict: Verdict | None = None,
) -> Evidence:
    """Shuffle the samples, since classes may be stored one after the other, and check the images as the judge does."""
    batch = next(judge.checked_batches(model, _Shuffled(split, seed), min(n, len(split)), threat))
    named = tuple(str(name) for name in getattr(split, "classes", ()))
    evidence = Evidence(model, batch, threat, seed, surrogate, verdict, named)
    require_labels(batch.y, evidence.clean.shape[1])
    return evidence


def _plan(evidence: Evidence) -> list[Check]:
    """Choose the checks: where the table has the answer, it is read instead of attacking again."""
    verdict = evidence.verdict
    if not evidence.clean.isfinite().all():
        return [gradients.finite]
    if len(evidence.right) == 0:
        return list(OUTPUTS)
    known = {searches.black_box} if verdict is not None and verdict.has_blind else set()
    known |= {searches.other_loss} if verdict is not None and verdict.has_weak else set()
    return [*OUTPUTS, *(check for check in ATTACKED if check not in known)]


def _about_the_number(finding: Finding, evidence: Evidence) -> Finding:
    """Lower the grade of an objection to a weaker attack than those behind the number shown."""
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
