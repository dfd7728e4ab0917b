"""Define the protocols of attacks, terms, defenses and data splits, and the batches that flow between them."""

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
