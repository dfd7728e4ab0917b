"""The whole language of the package: what flows (Batch, Split) and what acts (Attack, Term, ParameterDefense)."""

from unmoved.core.batch import Batch, Image, Index, Label, Logits, PerSample, Table
from unmoved.core.protocols import (
    Attack,
    AttackDeclarations,
    Ensemble,
    Method,
    MinimumNormAttack,
    ParameterDefense,
    Split,
    StatefulAttack,
    StatefulTerm,
    Term,
    TermDeclarations,
)

__all__ = [
    "Attack",
    "AttackDeclarations",
    "Batch",
    "Ensemble",
    "Image",
    "Index",
    "Label",
    "Logits",
    "Method",
    "MinimumNormAttack",
    "ParameterDefense",
    "PerSample",
    "Split",
    "StatefulAttack",
    "StatefulTerm",
    "Table",
    "Term",
    "TermDeclarations",
]
