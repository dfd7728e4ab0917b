"""Checks computed from the outcomes table alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd

from unmoved import attacks as exported
from unmoved.core.protocols import FIXED_STEP, QUERIES, TRANSFER, kind_of, kinds_of
from unmoved.core.threat import ThreatModel
from unmoved.evaluation import outcomes
from unmoved.evaluation.doctor.evidence import Evidence
from unmoved.evaluation.doctor.finding import Finding
from unmoved.evaluation.doctor.searches import beaten, grade, loss_gap, weaker_wins

BLIND = {QUERIES, TRANSFER}
# How many points more than the table's attacks the doctor's own searches may break on the same samples. Evaluated by
# PGD and APGD with cross-entropy alone, honest TRADES models lose 15.
OWN_CLOSER, OWN_WRONG = 0.05, 0.25


def kinds_in(table: pd.DataFrame, attacks: Mapping[str, object]) -> dict[str, dict[str, str]]:
    """Map attacks to the kinds of their parts: as declared, or as the class that a name begins with declares.

    Args:
        table: outcomes.
        attacks: name -> the attack, or the kinds of its parts (`unmoved.core.protocols.kinds_of`), as evaluations
            record them, or its repr, which is all that those made before version 0.2 have. The attack's name in the
            table stands in for what is missing.
    """
    return {name: _kinds(name, attacks.get(name, name)) for name in table["attack"].unique()}


def _kinds(name: str, attack: object) -> dict[str, str]:
    if isinstance(attack, Mapping):
        return {str(part): str(kind) for part, kind in attack.items()}
    if not isinstance(attack, str):
        return kinds_of(name, attack, num_classes=10)  # type: ignore[arg-type]
    made = _class_of(attack)
    if made in (exported.AutoAttack, exported.Quick):
        return kinds_of(name, made(ThreatModel("linf", 0.1)), num_classes=10)
    return {name: kind_of(made)}


def _class_of(text: str) -> Any:
    """Find the exported attack whose name a repr, or a name chosen by hand such as ``pgd-20``, begins with."""
    classes = {name.lower(): thing for name, thing in vars(exported).items() if name in exported.__all__}
    classes |= {"fgsm": exported.PGD, "standard": exported.AutoAttack}
    begins = [name for name in classes if text.lower().replace("_", "").startswith(name)]
    return classes[max(begins, key=len)] if begins else None


def pgd_overrates(table: pd.DataFrame, attacks: Mapping[str, object]) -> Finding | None:
    """Find a large gap between PGD and the strongest attack of the table."""
    samples = outcomes.by_sample(table)
    if not has_weak(table, attacks):
        return None
    weak = [name for name, parts in kinds_in(table, attacks).items() if set(parts.values()) == {FIXED_STEP}]
    best = str(samples[weak].sum().idxmin())
    before, after, right = (int(samples[c].sum()) for c in (best, outcomes.WORST, outcomes.CLEAN))
    share = (before - after) / max(right, 1)
    return loss_gap(share, f"of {len(samples)} samples {best!r} leaves {before} robust, all attacks together {after}")


def blind_wins(table: pd.DataFrame, attacks: Mapping[str, object]) -> Finding | None:
    """Find samples of the table that only attacks without gradients broke, alone or as part of an ensemble."""
    table = outcomes.checked(table)
    if not has_blind(table, attacks):
        return None
    right = table[table["clean_prediction"] == table["label"]]
    wins = right[right["success"]]
    kinds = kinds_in(table, attacks)
    blind = [_kind_of_part(kinds[name], by) in BLIND for name, by in zip(wins["attack"], wins["by"], strict=True)]
    is_blind = pd.Series(blind, index=wins.index, dtype=bool)
    only_blind = is_blind.groupby(wins["index"]).all()
    count, samples = int(only_blind.sum()), right["index"].nunique()
    found = beaten(count / max(samples, 1), count)
    if found is None:
        return None
    who = " and ".join(repr(name) for name in sorted(set(wins["by"][is_blind])))
    left = samples - int((~only_blind).sum())
    return weaker_wins(
        "black-box stronger", found, f"{who} broke {count} of {left} samples that no gradient attack of the table broke"
    )


def table_is_weak(table: pd.DataFrame, evidence: Evidence) -> Finding | None:
    """Find samples that the table calls robust and that the doctor's own attacks broke."""
    samples = outcomes.by_sample(table)
    robust = set(samples.loc[samples[outcomes.WORST], "index"])
    seen = [int(k) for k in evidence.right.index if int(k) in set(samples["index"])]
    broken = {int(k) for search in evidence.white_box for k in search.batch.index[search.broken]}
    count = len(broken & robust)
    found = grade(count / max(len(seen), 1), OWN_CLOSER, OWN_WRONG)
    if found is None or count < 3:
        return None
    return Finding(
        "attacked too weakly",
        found,
        f"of {len(seen)} samples that were looked at again, the doctor's own gradient attacks break {count} that the "
        "evaluation calls robust",
        "the accuracy reported is above what a modest search already refutes",
        "evaluate with stronger attacks (unmoved evaluate --attacks standard)",
    )


def has_blind(table: pd.DataFrame, attacks: Mapping[str, object]) -> bool:
    """Return whether the table holds an attack that uses no gradient, beside one that does."""
    kinds = {kind for parts in kinds_in(table, attacks).values() for kind in parts.values()}
    return bool(kinds & BLIND and kinds - BLIND)


def has_weak(table: pd.DataFrame, attacks: Mapping[str, object]) -> bool:
    """Return whether the table holds PGD, or what declares itself as weak, beside something else."""
    is_weak = {set(parts.values()) == {FIXED_STEP} for parts in kinds_in(table, attacks).values()}
    return is_weak == {True, False}


def _kind_of_part(parts: Mapping[str, str], by: str) -> str:
    """Return the kind of what broke a sample; if its ensemble no longer has that part, go by the name."""
    return parts.get(by) or kind_of(_class_of(by))
