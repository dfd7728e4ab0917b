"""Draw the figures of a report from tables, one file per theme; no model is used here."""

from unmoved.reports.figures.broken_by import breakdown
from unmoved.reports.figures.runs import (
    AUTOATTACK,
    SAMPLED,
    best_epoch,
    gallery,
    per_class,
    robustness_curve,
    successes,
    tradeoff,
    training_curves,
)

__all__ = [
    "AUTOATTACK",
    "SAMPLED",
    "best_epoch",
    "breakdown",
    "gallery",
    "per_class",
    "robustness_curve",
    "successes",
    "tradeoff",
    "training_curves",
]
