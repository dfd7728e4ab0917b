"""Tables -> figures of a report, one file per theme; no figure touches a model."""

from unmoved.reports.figures.broken_by import breakdown
from unmoved.reports.figures.runs import best_epoch, gallery, per_class, robustness_curve, tradeoff, training_curves

__all__ = ["best_epoch", "breakdown", "gallery", "per_class", "robustness_curve", "tradeoff", "training_curves"]
