"""Check the table of outcomes that the number shown comes from."""

from __future__ import annotations

import pandas as pd

from unmoved.evaluation import outcomes
from unmoved.evaluation.doctor.confidence import grade
from unmoved.evaluation.doctor.evidence import Evidence
from unmoved.evaluation.doctor.finding import Finding
from unmoved.evaluation.doctor.searches import beaten, loss_gap, weaker_wins

# How many points more than the table's attacks the doctor's own searches may break on the same samples. Evaluated by
# PGD and APGD with cross-entropy alone, honest TRADES models lose 15; what AutoAttack leaves loses under 1.
OWN_CLOSER, OWN_WRONG, OWN_LEAST = 0.05, 0.25, 3
AFTER_AUTOATTACK_CLOSER, AFTER_AUTOATTACK_WRONG = 0.02, 0.1


def pgd_overrates(evidence: Evidence) -> Finding | None:
    """Find a large gap between PGD and the strongest attack of the table."""
    verdict = evidence.verdict
    if verdict is None or not verdict.has_weak:
        return None
    samples = verdict.samples
    best = str(samples[verdict.weak].sum().idxmin())
    before, after, right = (int(samples[c].sum()) for c in (best, outcomes.WORST, outcomes.CLEAN))
    measured = f"of {len(samples)} samples {best!r} leaves {before} robust, all attacks together {after}"
    return loss_gap(before - after, right, measured, verdict.by_autoattack)


def blind_wins(evidence: Evidence) -> Finding | None:
    """Find samples of the table that only attacks without gradients broke, alone or as part of an ensemble."""
    verdict = evidence.verdict
    if verdict is None or not verdict.has_blind:
        return None
    right = verdict.table[verdict.table["clean_prediction"] == verdict.table["label"]]
    wins = right[right["success"]]
    blind = [verdict.is_blind(attack, by) for attack, by in zip(wins["attack"], wins["by"], strict=True)]
    is_blind = pd.Series(blind, index=wins.index, dtype=bool)
    only_blind = is_blind.groupby(wins["index"]).all()
    count, samples = int(only_blind.sum()), right["index"].nunique()
    found = beaten(count, count, samples)
    if found is None:
        return None
    who = " and ".join(repr(name) for name in sorted(set(wins["by"][is_blind])))
    left = samples - int((~only_blind).sum())
    return weaker_wins(
        "black-box stronger", found, f"{who} broke {count} of {left} samples that no gradient attack of the table broke"
    )


def table_is_weak(evidence: Evidence) -> Finding | None:
    """Find samples that the table calls robust and that the doctor's own attacks broke."""
    verdict = evidence.verdict
    if verdict is None:
        return None
    known = set(verdict.samples["index"])
    seen = [int(k) for k in evidence.right.index if int(k) in known]
    searches = [*evidence.white_box, evidence.transferred]
    searches += [] if verdict.has_blind else [evidence.black_box]  # the table's own had more queries
    broken = {int(k) for search in searches for k in search.batch.index[search.broken]}
    count = len(broken & verdict.robust)
    bars = (OWN_CLOSER, OWN_WRONG)
    if verdict.by_autoattack:
        bars = (AFTER_AUTOATTACK_CLOSER, AFTER_AUTOATTACK_WRONG)
    found = grade(count, len(seen), *bars)
    if found is None or count < OWN_LEAST:
        return None
    return Finding(
        "attacked too weakly",
        found,
        f"of {len(seen)} samples that were looked at again, the doctor's own attacks break {count} that the evaluation "
        "calls robust",
        "the accuracy reported is above what a modest search already refutes",
        "AutoAttack is not enough here: attack with more restarts and steps, and by a search adapted to the model"
        if verdict.by_autoattack
        else "evaluate with stronger attacks (unmoved evaluate --attacks standard)",
    )
