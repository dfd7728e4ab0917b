"""Analyse run folders: each study makes its tables, or reads those made before, and says what they mean."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from unmoved.analyses.studies import bias_variance, corruption, softmax, tradeoff
from unmoved.analyses.studies.study import AnalysedRun, Progress, Study, names_of, no_progress, subjects
from unmoved.core.errors import require_choice

NAMES = ("softmax", "corruption", "bias-variance", "tradeoff")

__all__ = ["NAMES", "Progress", "Study", "AnalysedRun", "names_of", "prepare", "study", "subjects", "no_progress"]


def study(name: str, found: Sequence[AnalysedRun], progress: Progress = no_progress, **settings: Any) -> Study:
    """One of `NAMES`; ``settings`` are those of its own function.

    Raises:
        UnmovedError: an unknown name; whatever the analysis refuses.
    """
    require_choice("analyze", name, NAMES)
    if name == "tradeoff":
        return tradeoff.study(found)
    acts: dict[str, Callable[..., Study]] = {
        "softmax": softmax.study,
        "corruption": corruption.study,
        "bias-variance": bias_variance.study,
    }
    return acts[name](found, progress=progress, **settings)


def prepare(name: str, subject: AnalysedRun) -> None:
    """The part of an analysis that belongs to one run alone, put on its shelf: what a pool of processes shares out."""
    require_choice("analyze", name, NAMES)
    if name == "softmax":
        softmax.observe(subject)
    elif name == "corruption":
        corruption.measure(subject)
