"""Make a linear model, whose optimal attack is known in closed form, and a multilayer perceptron."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence
from itertools import pairwise

from torch import nn

from unmoved.core.errors import UnmovedError, require_whole
from unmoved.models.input_layers import entrance, require_sizes


def linear(
    shape: tuple[int, int, int],
    num_classes: int,
    *,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> nn.Sequential:
    """Make a softmax regression, ``W x + b`` of the flattened image, (B, C, H, W) to (B, K); raise as `entrance`."""
    shape, num_classes = require_sizes(shape, num_classes)
    first = entrance(shape, num_classes, mean, std)
    return nn.Sequential(OrderedDict(first, flatten=nn.Flatten(), linear=nn.Linear(math.prod(shape), num_classes)))


def mlp(
    shape: tuple[int, int, int],
    num_classes: int,
    *,
    hidden: tuple[int, ...] = (256,),
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> nn.Sequential:
    """Make a perceptron with ReLU after each hidden layer, (B, C, H, W) to (B, K).

    Args:
        hidden: the width of each hidden layer; ``()`` is a linear model.

    Raises:
        UnmovedError: a hidden width below 1; otherwise as `entrance`.
    """
    shape, num_classes = require_sizes(shape, num_classes)
    layers: dict[str, nn.Module] = {**entrance(shape, num_classes, mean, std), "flatten": nn.Flatten()}
    if not isinstance(hidden, Sequence):
        raise UnmovedError(
            f"hidden: expected a list of widths, came {hidden!r}; for one hidden layer write ({hidden!r},)"
        )
    hidden = tuple(require_whole("hidden", width, at_least=1) for width in hidden)
    for depth, (before, after) in enumerate(pairwise((math.prod(shape), *hidden)), start=1):
        layers |= {f"fc{depth}": nn.Linear(before, after), f"relu{depth}": nn.ReLU()}
    width = hidden[-1] if hidden else math.prod(shape)
    return nn.Sequential(OrderedDict(layers, linear=nn.Linear(width, num_classes)))
