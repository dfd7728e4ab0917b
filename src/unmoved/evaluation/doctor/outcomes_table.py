"""What an evaluation's own table says against itself."""

from __future__ import annotations

from collections.abc import Mapping

import pandas as pd

from unmoved.evaluation import outcomes
from unmoved.evaluation.doctor.evidence import Case
from unmoved.evaluation.doctor.finding import Finding
from unmoved.evaluation.doctor.searches import beaten, grade, loss_gap, weaker_wins

# Attacks by the start of their type's or their given name.
WEAK = ("pgd", "fgsm")
BLIND = ("square", "spsa", "transfer", "hopskipjump", "hard")
BOTH = ("autoattack", "standard")
# How many points more than the table's attacks the doctor's own searches may break on the same samples. Evaluated by
# PGD and APGD with cross-entropy alone, honest TRADES models lose 15.
OWN_CLOSER, OWN_WRONG = 0.05, 0.25


def kind(name: str, attack: object = None) -> str:
    """``"weak"``, ``"blind"`` (asks for no gradient), ``"both"`` (AutoAttack, which ends with Square) or ``"strong"``.

    Args:
        name: the attack's name in the table.
        attack: the attack or its repr; it decides where it is given.
    """
    text = str(attack if attack is not None else name).lower()
    starts = {"blind": BLIND, "weak": WEAK, "both": BOTH}
    return next((its for its, names in starts.items() if text.startswith(names)), "strong")


def pgd_overrates(table: pd.DataFrame, attacks: Mapping[str, object]) -> Finding | None:
    """A large gap between PGD and the strongest attack of the table."""
    samples, kinds = _read(table, attacks)
    weak = [name for name, its in kinds.items() if its == "weak"]
    if not has_weak(table, attacks):
        return None
    best = str(samples[weak].sum().idxmin())
    before, after, right = (int(samples[c].sum()) for c in (best, outcomes.WORST, outcomes.CLEAN))
    share = (before - after) / max(right, 1)
    return loss_gap(share, f"of {len(samples)} samples {best!r} leaves {before} robust, all attacks together {after}")


def blind_wins(table: pd.DataFrame, attacks: Mapping[str, object]) -> Finding | None:
    """Samples of the table that only attacks without gradients broke, alone or as part of an ensemble."""
    table = outcomes.checked(table)
    if not has_blind(table, attacks):
        return None
    right = table[table["clean_prediction"] == table["label"]]
    wins = right[right["success"]]
    is_blind = pd.Series([kind(by, attacks.get(by)) == "blind" for by in wins["by"]], index=wins.index, dtype=bool)
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


def table_is_weak(table: pd.DataFrame, case: Case) -> Finding | None:
    """Samples that the table calls robust and that the doctor's own searches broke."""
    samples, _ = _read(table, {})
    robust = set(samples.loc[samples[outcomes.WORST], "index"])
    seen = [int(k) for k in case.right.index if int(k) in set(samples["index"])]
    broken = {int(k) for search in case.white_box for k in search.batch.index[search.broken]}
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
    """Whether the table holds an attack that asks for no gradient, beside one that does."""
    kinds = {kind(name, attacks.get(name)) for name in table["attack"].unique()}
    return "both" in kinds or ("blind" in kinds and len(kinds) > 1)


def has_weak(table: pd.DataFrame, attacks: Mapping[str, object]) -> bool:
    """Whether the table holds PGD, beside something else."""
    kinds = {kind(name, attacks.get(name)) for name in table["attack"].unique()}
    return "weak" in kinds and len(kinds) > 1


def _read(table: pd.DataFrame, attacks: Mapping[str, object]) -> tuple[pd.DataFrame, dict[str, str]]:
    samples = outcomes.by_sample(table)
    return samples, {name: kind(name, attacks.get(name)) for name in table["attack"].unique()}
