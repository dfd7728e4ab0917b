"""Tables -> figures, one file per theme; no figure touches a model."""

from unmoved.figures.breakdown import breakdown
from unmoved.figures.runs import best_epoch, gallery, per_class, robustness_curve, tradeoff, training_curves

__all__ = ["best_epoch", "breakdown", "gallery", "per_class", "robustness_curve", "tradeoff", "training_curves"]
