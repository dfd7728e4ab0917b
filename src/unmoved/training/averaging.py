"""Average the weights over a training (EMA, SWA), to validate, save and evaluate the average instead of the weights."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from unmoved.core.errors import UnmovedError, number_field
from unmoved.core.weights import assign, buffers, is_writable, write

Averaging = Callable[[int, int], float]


@dataclass(frozen=True)
class EMA:
    """Exponential moving average: ``v <- d v + (1 - d) w`` after each step, ``d = min(decay, (1 + t) / (10 + t))``.

    The smaller d of the first steps t (the schedule of TensorFlow's ``ExponentialMovingAverage`` with ``num_updates``)
    lets the average forget the random weights that it starts from: ``1 / C(t + 10, 9)`` of them are left after step t.
    With a fixed decay of 0.9995 half of them would still be left after 1,386 steps.

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
    """Return None: no average, the weights themselves are kept."""


class Average:
    """Hold a second model whose weights are the average of the trained one's.

    A tensor with several names is averaged once. Floating-point buffers, such as the running statistics of BatchNorm,
    are averaged in the same way, also those that ``state_dict`` leaves out; other tensors are copied.
    """

    def __init__(self, model: nn.Module, averaging: Averaging) -> None:
        try:
            self.model = copy.deepcopy(model).requires_grad_(False)
        except Exception as error:  # a user's model may hold something that cannot be copied
            raise UnmovedError(
                f"average: expected a model that copy.deepcopy copies, came {type(model).__name__} "
                f"({str(error).partition(chr(10))[0]:.200}); keep no tensors of a pass in its attributes, or train "
                "without average"
            ) from error
        self._averaging = averaging
        # An infinite entry, as in a mask, has no mean with a number or with itself.
        self._boundless = {
            (k, name)
            for k, module in enumerate(self.model.modules())
            for name, value in buffers(module).items()
            if value is not None and _has_mean(value) and not value.isfinite().all()
        }

    @torch.no_grad()
    def follow(self, model: nn.Module, step: int, total: int) -> None:
        """Update the average with the weights after optimizer step ``step`` (from 0) of ``total``."""
        share = self._averaging(step, total)
        pairs = list(zip(self.model.parameters(), model.parameters(), strict=True))
        moving = [pair for pair in pairs if _has_mean(pair[0])]
        if moving:
            torch._foreach_lerp_([mine for mine, _ in moving], [theirs for _, theirs in moving], share)
        for mine, theirs in pairs:
            if not _has_mean(mine):
                mine.copy_(theirs)
        self._follow_buffers(model, share)

    def _follow_buffers(self, model: nn.Module, share: float) -> None:
        """Average buffers into new tensors, since they may share memory and would be written to twice."""
        moving: list[tuple[nn.Module, str, Tensor, Tensor]] = []
        for k, (mine, theirs) in enumerate(zip(self.model.modules(), model.modules(), strict=True)):
            before = buffers(mine)
            for name, now in buffers(theirs).items():
                if name in theirs._buffers and name not in mine._buffers:
                    is_saved = name not in theirs._non_persistent_buffers_set
                    mine.register_buffer(name, None, persistent=is_saved)
                old = before.get(name)
                if now is None or old is None or (k, name) in self._boundless or not _are_like(old, now):
                    assign(mine, name, None if now is None else now.detach().clone())
                else:
                    moving.append((mine, name, old, now))
        if moving:
            averages = torch._foreach_lerp([old for *_, old, _ in moving], [now for *_, now in moving], share)
            for (mine, name, _, _), new in zip(moving, averages, strict=True):
                assign(mine, name, new)

    @torch.no_grad()
    def give(self, model: nn.Module) -> None:
        """Set parameters and buffers of ``model``, which this average has followed, to the averaged ones."""
        pairs: list[tuple[Tensor, Tensor]] = list(zip(model.parameters(), self.model.parameters(), strict=True))
        for mine, theirs in zip(self.model.modules(), model.modules(), strict=True):
            values = buffers(mine)
            for name, now in buffers(theirs).items():
                value = values.get(name)
                if now is None or value is None or not is_writable(now):
                    assign(theirs, name, None if value is None else value.clone())
                else:
                    pairs.append((now, value.clone()))
        write(pairs)


def _has_mean(tensor: Tensor) -> bool:
    return (tensor.is_floating_point() or tensor.is_complex()) and tensor.layout is torch.strided


def _are_like(old: Tensor, now: Tensor) -> bool:
    return _has_mean(now) and (old.shape, old.dtype) == (now.shape, now.dtype)


AVERAGES = (none, EMA, SWA)
