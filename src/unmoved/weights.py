"""Which weight corruptions are allowed, and the guards that restore what a corruption or an attack changes."""

from unmoved.core.weights import (
    Tensors,
    assign,
    buffers,
    constant_beside,
    evaluating,
    frozen_batchnorm,
    frozen_buffers,
    holders,
    in_training,
    is_writable,
    norm,
    perturbed,
    project,
    steepest,
    trainable,
    write,
)

__all__ = [
    "Tensors",
    "assign",
    "buffers",
    "constant_beside",
    "evaluating",
    "frozen_batchnorm",
    "frozen_buffers",
    "holders",
    "in_training",
    "is_writable",
    "norm",
    "perturbed",
    "project",
    "steepest",
    "trainable",
    "write",
]
