"""Analyse run folders: each study makes its tables, or reads those made before, and says what they mean."""

from __future__ import annotations

from importlib import import_module

from unmoved.analyses.studies.kind import StudyKind
from unmoved.analyses.studies.study import AnalysedRun, Progress, Study, names_of, no_progress, subjects

# One line for each analysis, in the order of the help: its module, and in it the class.
CLASSES = (
    "softmax:Softmax",
    "corruption:Corruption",
    "bias_variance:BiasVariance",
    "tradeoff:TradeOff",
)


def _kind(path: str) -> type[StudyKind]:
    module, name = path.split(":")
    kind: type[StudyKind] = getattr(import_module(f"{__name__}.{module}"), name)
    return kind


STUDIES = {kind.name: kind for kind in map(_kind, CLASSES)}

__all__ = ["STUDIES", "AnalysedRun", "Progress", "Study", "StudyKind", "names_of", "no_progress", "subjects"]
