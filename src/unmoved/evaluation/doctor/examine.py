"""Examine an evaluated model for gradient masking and for mistakes that look like robustness."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import pandas as pd
import torch
from torch import nn

from unmoved.core.batch import Batch
from unmoved.core.errors import require_seed, require_whole
from unmoved.core.preconditions import require_labels, require_model, require_split
from unmoved.core.protocols import Split
from unmoved.core.threat import ThreatModel, require_threat
from unmoved.evaluation import judge
from unmoved.evaluation.doctor import gradients, outcomes_table, outputs, searches
from unmoved.evaluation.doctor.evidence import Evidence
from unmoved.evaluation.doctor.finding import GRADES, Finding

ORDER = "examine(model, split, threat)"
Check = Callable[[Evidence], Finding | None]
# What the model is, before anything is attacked.
OUTPUTS: tuple[Check, ...] = (
    outputs.mode,
    outputs.stochastic,
    outputs.companions,
    outputs.probabilities,
    outputs.normalisation,
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
)


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
        outcomes: the table of `unmoved.evaluate`: what it says of PGD and of attacks without gradients is read
            from it, and it is held against the searches made here.
        attacks: the attacks of that table, name -> attack (or what `outcomes_table.kinds_in` takes in its place);
            those left out are taken for what their names say.
        surrogate: another model of the same task, for a transfer attack.
        n: number of samples, drawn from the split by ``seed``.
        seed: of all noise; the caller's random state is left alone.
        progress: called with (checks done, checks in all, the check at work).

    Raises:
        UnmovedError: arguments that are no model, split and threat model; no data; images out of range; a model
            that returns no logits (B, K); labels beyond the logits.
    """
    require_model(model, ORDER)
    require_split(split, ORDER)
    require_threat("threat", threat)
    n, seed = require_whole("n", n, at_least=1), require_seed("seed", seed)
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    # A randomised model draws from the global generator: its draws are fixed, and the caller's state is put back.
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        evidence = _evidence(model, split, threat, n, seed, surrogate)
        plan, findings = _plan(evidence, outcomes, attacks or {}), []
        for done, check in enumerate(plan):
            if progress is not None:
                progress(done, len(plan), check.__name__.replace("_", " "))
            found = check(evidence)
            findings += [] if found is None else [found]
        if progress is not None:
            progress(len(plan), len(plan), "done")
    return sorted(findings, key=lambda finding: GRADES.index(finding.grade))


def _evidence(
    model: nn.Module, split: Split, threat: ThreatModel, n: int, seed: int, surrogate: nn.Module | None
) -> Evidence:
    """Shuffle the samples, since classes may be stored one after the other, and check the images as the judge does."""
    batch = next(judge.checked_batches(model, _Shuffled(split, seed), min(n, len(split)), threat))
    evidence = Evidence(model, batch, threat, seed, surrogate)
    require_labels(batch.y, evidence.clean.shape[1])
    return evidence


def _plan(evidence: Evidence, table: pd.DataFrame | None, attacks: Mapping[str, object]) -> list[Check]:
    """Choose the checks: where the outcomes table has the answer, it is read instead of attacking again."""
    if not evidence.clean.isfinite().all():
        return [gradients.finite]
    if len(evidence.right) == 0:
        return [*OUTPUTS, outputs.nothing_right]
    if table is None:
        return [*OUTPUTS, *ATTACKED]
    known = {searches.black_box} if outcomes_table.has_blind(table, attacks) else set()
    known |= {searches.other_loss} if outcomes_table.has_weak(table, attacks) else set()
    return [*OUTPUTS, *(check for check in ATTACKED if check not in known), *_readings(table, attacks)]


def _readings(table: pd.DataFrame, attacks: Mapping[str, object]) -> list[Check]:
    def pgd_overrates(evidence: Evidence) -> Finding | None:
        return outcomes_table.pgd_overrates(table, attacks)

    def blind_wins(evidence: Evidence) -> Finding | None:
        return outcomes_table.blind_wins(table, attacks)

    def table_is_weak(evidence: Evidence) -> Finding | None:
        return outcomes_table.table_is_weak(table, evidence)

    return [pgd_overrates, blind_wins, table_is_weak]


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
