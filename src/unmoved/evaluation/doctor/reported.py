"""Read the outcomes behind the reported robust accuracy: which attacks ran, and which samples they left robust."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any

import pandas as pd

from unmoved import attacks as exported
from unmoved.core.protocols import FIXED_STEP, QUERIES, TRANSFER, kind_of, kinds_of
from unmoved.core.threat import ThreatModel
from unmoved.evaluation import outcomes

GRADIENT_FREE = {QUERIES, TRANSFER}
CLASSES = 10  # number of classes by which the parts of an ensemble are named if the real number is not known
ANY_BALL = ThreatModel("linf", 0.1)


class ReportedOutcomes:
    """Hold the outcomes behind the reported robust accuracy, and the kinds of the attacks.

    Args:
        table: the outcomes, one row per sample and attack.
        attacks: as `kinds_in` takes them.

    Raises:
        UnmovedError: see `outcomes.by_sample`.
    """

    def __init__(self, table: pd.DataFrame, attacks: Mapping[str, object]) -> None:
        self.table = outcomes.checked(table)
        self.samples = outcomes.by_sample(self.table, is_checked=True)
        self.kinds = kinds_in(self.table, attacks)

    @cached_property
    def robust(self) -> frozenset[int]:
        """Return the identities of the samples that are robust in the worst case over all attacks."""
        return frozenset(self.samples.loc[self.samples[outcomes.WORST], "index"])

    @property
    def weak(self) -> list[str]:
        """Return the attacks that take steps of fixed size, as PGD does."""
        return [name for name, parts in self.kinds.items() if set(parts.values()) == {FIXED_STEP}]

    @property
    def has_weak(self) -> bool:
        """Return whether the table holds an attack of fixed step size, such as PGD, beside one of another kind."""
        return 0 < len(self.weak) < len(self.kinds)

    @property
    def has_gradient_free(self) -> bool:
        """Return whether the table holds an attack that uses no gradient."""
        return bool(self._all_kinds & GRADIENT_FREE)

    @property
    def has_both_kinds(self) -> bool:
        """Return whether the table holds an attack that uses gradients and one that uses none."""
        return self.has_gradient_free and bool(self._all_kinds - GRADIENT_FREE)

    @property
    def by_autoattack(self) -> bool:
        """Return whether AutoAttack's standard version is among the attacks."""
        return self._ran("standard")

    @property
    def by_rand(self) -> bool:
        """Return whether AutoAttack's version for randomised models is among the attacks."""
        return self._ran("rand")

    def is_gradient_free(self, attack: str, by: str) -> bool:
        """Return whether a part of an attack uses no gradient; one that the ensemble no longer has goes by its name."""
        return (self.kinds[attack].get(by) or kind_of(_class_of(by))) in GRADIENT_FREE

    @property
    def _all_kinds(self) -> set[str]:
        return {kind for parts in self.kinds.values() for kind in parts.values()}

    def _ran(self, version: str) -> bool:
        parts = [set(exported.AutoAttack(ANY_BALL, version=version).parts(k)) for k in (2, 3, CLASSES)]
        return any(set(kinds) in parts for kinds in self.kinds.values())


def kinds_in(table: pd.DataFrame, attacks: Mapping[str, object]) -> dict[str, dict[str, str]]:
    """Map each attack to the kinds of its parts, as declared by the attack or by the class that its name begins with.

    Args:
        table: outcomes.
        attacks: name -> the attack, the kinds of its parts (`unmoved.core.protocols.kinds_of`, as evaluations record
            them), or its repr (as evaluations before version 0.2 record it). Missing ones are known by their name in
            the table.
    """
    return {name: _kinds(name, attacks.get(name, name)) for name in table["attack"].unique()}


def _kinds(name: str, attack: object) -> dict[str, str]:
    if isinstance(attack, Mapping):
        return {str(part): str(kind) for part, kind in attack.items()}
    if not isinstance(attack, str):
        return kinds_of(name, attack, CLASSES)  # type: ignore[arg-type]
    made = _class_of(attack)
    if made is exported.AutoAttack:
        return kinds_of(name, made(ANY_BALL, version="rand" if "rand" in attack else "standard"), CLASSES)
    return kinds_of(name, made(ANY_BALL), CLASSES) if made is exported.Quick else {name: kind_of(made)}


def _class_of(text: str) -> Any:
    """Find the exported attack whose name a repr, or a name chosen by hand such as ``pgd-20``, begins with."""
    classes = {name.lower(): thing for name, thing in vars(exported).items() if name in exported.__all__}
    classes |= {"fgsm": exported.PGD, "standard": exported.AutoAttack}
    begins = [name for name in classes if text.lower().replace("_", "").startswith(name)]
    return classes[max(begins, key=len)] if begins else None
