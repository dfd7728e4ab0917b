"""Tables -> figures, one file per theme; no figure touches a model."""

from unmoved.analyses.studies.bias_variance_figures import bias_variance, bias_variance_by_class
from unmoved.analyses.studies.corruption_figures import (
    corruption_curves,
    corruption_layers,
    flatness,
    loss_lines,
    loss_surface,
)
from unmoved.analyses.studies.softmax_figures import across as softmax_across
from unmoved.analyses.studies.softmax_figures import landings as softmax_landings
from unmoved.analyses.studies.softmax_figures import within as softmax_within
from unmoved.analyses.studies.tradeoff_figures import pareto
from unmoved.reports.figures.broken_by import breakdown
from unmoved.reports.figures.runs import best_epoch, gallery, per_class, robustness_curve, tradeoff, training_curves

__all__ = [
    "best_epoch",
    "bias_variance",
    "bias_variance_by_class",
    "breakdown",
    "corruption_curves",
    "corruption_layers",
    "flatness",
    "gallery",
    "loss_lines",
    "loss_surface",
    "pareto",
    "per_class",
    "robustness_curve",
    "softmax_across",
    "softmax_landings",
    "softmax_within",
    "tradeoff",
    "training_curves",
]
