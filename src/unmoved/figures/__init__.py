"""Tables -> figures, one file per theme; no figure touches a model."""

from unmoved.figures.bias_variance import bias_variance, bias_variance_by_class
from unmoved.figures.breakdown import breakdown
from unmoved.figures.corruption import corruption_curves, corruption_layers, flatness, loss_lines, loss_surface
from unmoved.figures.pareto import pareto
from unmoved.figures.runs import best_epoch, gallery, per_class, robustness_curve, tradeoff, training_curves
from unmoved.figures.softmax import across as softmax_across
from unmoved.figures.softmax import landings as softmax_landings
from unmoved.figures.softmax import within as softmax_within

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
