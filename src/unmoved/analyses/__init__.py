"""Analyse why a model is robust, and at what price: functions on tensors and models that `unmoved analyze` uses."""

from unmoved.analyses import (
    association,
    bias_variance,
    bias_variance_claims,
    committee,
    corruption,
    flatness,
    hessian,
    pareto,
    risks,
    softmax,
    surface,
    target_probability,
)

__all__ = [
    "association",
    "bias_variance",
    "bias_variance_claims",
    "committee",
    "corruption",
    "flatness",
    "hessian",
    "pareto",
    "risks",
    "softmax",
    "surface",
    "target_probability",
]
