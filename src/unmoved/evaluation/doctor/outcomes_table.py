"""Check the outcomes behind the reported robust accuracy: which attacks broke which samples, and how many are left."""

from __future__ import annotations

import pandas as pd

from unmoved.evaluation import outcomes
from unmoved.evaluation.doctor.confidence import grade
from unmoved.evaluation.doctor.evidence import Evidence
from unmoved.evaluation.doctor.finding import Finding
from unmoved.evaluation.doctor.searches import beaten, loss_gap, weaker_wins

# How many percent of the samples the doctor's own attacks may break beyond those that the table's attacks broke. After
# an evaluation by PGD and APGD with cross-entropy alone, honest TRADES models lose 15; after AutoAttack, under 1.
OWN_CLOSER, OWN_WRONG, OWN_LEAST = 0.05, 0.25, 3
AFTER_AUTOATTACK_CLOSER, AFTER_AUTOATTACK_WRONG = 0.02, 0.1


def pgd_overrates(evidence: Evidence) -> Finding | None:
    """Find a large gap between PGD and the strongest attack of the table."""
    reported = evidence.reported
    if reported is None or not reported.has_weak:
        return None
    samples = reported.samples
    best = str(samples[reported.weak].sum().idxmin())
    before, after, right = (int(samples[c].sum()) for c in (best, outcomes.WORST, outcomes.CLEAN))
    measured = f"of {len(samples)} samples {best!r} leaves {before} robust, all attacks together {after}"
    return loss_gap(before - after, right, measured, reported.by_autoattack)


def gradient_free_wins(evidence: Evidence) -> Finding | None:
    """Find samples of the table that only attacks without gradients broke, alone or as part of an ensemble."""
    reported = evidence.reported
    if reported is None or not reported.has_both_kinds:
        return None
    right = reported.table[reported.table["clean_prediction"] == reported.table["label"]]
    wins = right[right["success"]]
    flags = [reported.is_gradient_free(attack, by) for attack, by in zip(wins["attack"], wins["by"], strict=True)]
    is_gradient_free = pd.Series(flags, index=wins.index, dtype=bool)
    only_gradient_free = is_gradient_free.groupby(wins["index"]).all()
    count, samples = int(only_gradient_free.sum()), right["index"].nunique()
    found = beaten(count, count, samples)
    if found is None:
        return None
    who = " and ".join(repr(name) for name in sorted(set(wins["by"][is_gradient_free])))
    left = samples - int((~only_gradient_free).sum())
    return weaker_wins(
        "black-box stronger", found, f"{who} broke {count} of {left} samples that no gradient attack of the table broke"
    )


def table_is_weak(evidence: Evidence) -> Finding | None:
    """Find samples that the table calls robust and that the doctor's own attacks broke."""
    reported = evidence.reported
    if reported is None:
        return None
    known = set(reported.samples["index"])
    seen = [int(k) for k in evidence.right.index if int(k) in known]
    searches = [*evidence.white_box, evidence.transferred]
    searches += [] if reported.has_both_kinds else [evidence.black_box]  # the table's random search had more queries
    broken = {int(k) for search in searches for k in search.batch.index[search.broken]}
    count = len(broken & reported.robust)
    bars = (OWN_CLOSER, OWN_WRONG)
    if reported.by_autoattack:
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
        if reported.by_autoattack
        else "evaluate with stronger attacks (unmoved evaluate --attacks standard)",
    )
