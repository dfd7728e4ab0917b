"""Averages of the weights along a training: what is validated, kept and judged in place of the last weights."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from unmoved.errors import number_field

Averaging = Callable[[int, int], float]


@dataclass(frozen=True)
class EMA:
    """Exponential moving average: ``v <- d v + (1 - d) w`` after each step, ``d = min(decay, (1 + t) / (10 + t))``.

    The smaller d of the first steps t lets the average forget the random weights that it starts from.

    Raises:
        UnmovedError: a decay outside [0, 1].
    """

    decay: float = 0.999

    def __post_init__(self) -> None:
        number_field(self, "average.decay", at_least=0, at_most=1)

    def __call__(self, step: int, total: int) -> float:
        return 1 - min(self.decay, (1 + step) / (10 + step))


@dataclass(frozen=True)
class SWA:
    """Stochastic weight averaging: the plain mean of the weights after each step of the last part of a training.

    ``v <- v + (w - v) / k`` for the k-th of these steps; before them v is w. Izmailov et al. 2018, averaged at each
    step instead of once an epoch.

    Args:
        start: share of the training after which averaging begins.

    Raises:
        UnmovedError: a start outside [0, 1].
    """

    start: float = 0.75

    def __post_init__(self) -> None:
        number_field(self, "average.start", at_least=0, at_most=1)

    def __call__(self, step: int, total: int) -> float:
        return 1 / max(1, step - int(self.start * total) + 1)


def none() -> None:
    """No average: the weights themselves."""


class Average:
    """A model beside the trained one, which follows it as an `Averaging` says.

    Floating-point buffers, such as the running statistics of BatchNorm, are averaged alike; others are copied.
    """

    def __init__(self, model: nn.Module, averaging: Averaging) -> None:
        self.model = copy.deepcopy(model).requires_grad_(False)
        self._averaging = averaging

    @torch.no_grad()
    def follow(self, model: nn.Module, step: int, total: int) -> None:
        """Take in the weights after optimizer step ``step`` (from 0) of ``total``."""
        share = self._averaging(step, total)
        mine, theirs = self.model.state_dict().values(), model.state_dict().values()
        pairs = list(zip(mine, theirs, strict=True))
        floats = [(a, b) for a, b in pairs if a.is_floating_point()]
        torch._foreach_lerp_([a for a, _ in floats], [b for _, b in floats], share)
        for a, b in pairs:
            if not a.is_floating_point():
                a.copy_(b)


AVERAGES = (none, EMA, SWA)
