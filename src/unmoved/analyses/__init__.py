"""Why is it robust, and at what price: plain functions on tensors and models; `unmoved analyze` uses them on runs."""

from unmoved.analyses import (
    association,
    bias_variance,
    bias_variance_verdict,
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
    "bias_variance_verdict",
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
