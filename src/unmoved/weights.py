"""Perturb a model's weights within a ball, and restore weights, modes and buffers after corruptions and attacks."""

from unmoved.core.weights import (
    Tensors,
    assign,
    buffers,
    constant_beside,
    evaluating,
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
