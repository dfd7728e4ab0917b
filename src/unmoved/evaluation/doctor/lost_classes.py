"""Find classes that a model never or hardly recognises, or that lose everything under attack, unlike the others."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from unmoved.evaluation.doctor.confidence import lower, upper
from unmoved.evaluation.doctor.finding import DO_NOT_BELIEVE, GRADES, LOOK_CLOSER, NOTE

# Upper bound of a class's recall, divided by the lower bound of the others': for a recall of 0, and for any recall.
NONE_CLOSER, SOME_CLOSER, SOME_NOTE = 0.5, 0.25, 0.5
# The same under attack, where honest models differ more from class to class.
NONE_ROBUST, SOME_ROBUST = 1 / 3, 0.1


class LostClass(NamedTuple):
    """A class with ``hits`` of ``n`` samples right (or robust); of the other classes, at least the share ``others``."""

    grade: str
    label: int
    hits: int
    n: int
    others: float


def lost_clean(label: npt.NDArray[np.int64], right: npt.NDArray[np.bool_]) -> list[LostClass]:
    """List the classes of recall 0, or far below that of the others, on clean images; the gravest first."""
    return _lost(
        label,
        right,
        lambda hits: (
            (DO_NOT_BELIEVE, NONE_CLOSER if hits == 0 else 0.0),
            (LOOK_CLOSER, SOME_CLOSER),
            (NOTE, SOME_NOTE),
        ),
    )


def lost_under_attack(
    label: npt.NDArray[np.int64], right: npt.NDArray[np.bool_], robust: npt.NDArray[np.bool_]
) -> list[LostClass]:
    """List the classes of whose correctly classified samples almost none is robust, the gravest first."""
    return _lost(
        label[right],
        robust[right],
        lambda hits: (
            (LOOK_CLOSER, NONE_ROBUST if hits == 0 else SOME_ROBUST),
            (NOTE, SOME_NOTE if hits == 0 else 0.0),
        ),
    )


def _lost(
    label: npt.NDArray[np.int64], hit: npt.NDArray[np.bool_], bars: Callable[[int], Sequence[tuple[str, float]]]
) -> list[LostClass]:
    """Grade each class by the ratio of its share's upper bound to the lower bound of all other samples' share."""
    total, found = int(hit.sum()), list[LostClass]()
    for k in np.unique(label):
        hits, n = int(hit[label == k].sum()), int((label == k).sum())
        others = lower(total - hits, len(hit) - n)
        bound = upper(hits, n) / max(others, 1e-12)
        grade = next((grade for grade, bar in bars(hits) if bound <= bar), None)
        if grade is not None:
            found.append(LostClass(grade, int(k), hits, n, others))
    return sorted(found, key=lambda lost: (GRADES.index(lost.grade), lost.label))
