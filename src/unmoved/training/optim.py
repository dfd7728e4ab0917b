"""Describe torch's optimizers and learning-rate schedules as values, for recipes and for `unmoved.train`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ConstantLR, CosineAnnealingLR, LRScheduler, MultiStepLR, OneCycleLR
from torch.optim.optimizer import StateDict

from unmoved.core.errors import UnmovedError, flag_field, number_field, require_whole

Groups: TypeAlias = list[StateDict]  # "params", and settings of their own


@dataclass(frozen=True)
class SGD:
    """`torch.optim.SGD`. Raises `UnmovedError` on a negative value."""

    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 5e-4
    nesterov: bool = False

    def __post_init__(self) -> None:
        number_field(self, "optimizer.lr", at_least=0)
        number_field(self, "optimizer.momentum", at_least=0)
        flag_field(self, "optimizer.nesterov")
        number_field(self, "optimizer.weight_decay", at_least=0)

    def __call__(self, groups: Groups) -> Optimizer:
        return torch.optim.SGD(groups, self.lr, self.momentum, weight_decay=self.weight_decay, nesterov=self.nesterov)


@dataclass(frozen=True)
class Adam:
    """`torch.optim.Adam`, or AdamW with ``decoupled`` weight decay. Raises `UnmovedError` on a negative value."""

    lr: float = 1e-3
    weight_decay: float = 0.0
    decoupled: bool = False

    def __post_init__(self) -> None:
        flag_field(self, "optimizer.decoupled")
        number_field(self, "optimizer.lr", at_least=0)
        number_field(self, "optimizer.weight_decay", at_least=0)

    def __call__(self, groups: Groups) -> Optimizer:
        kind: Callable[..., Optimizer] = torch.optim.AdamW if self.decoupled else torch.optim.Adam
        return kind(groups, lr=self.lr, weight_decay=self.weight_decay)


@dataclass(frozen=True)
class Constant:
    """The optimizer's own learning rate throughout."""

    def __call__(self, optimizer: Optimizer, total: int, per_epoch: int) -> LRScheduler:
        return ConstantLR(optimizer, factor=1.0)


@dataclass(frozen=True)
class MultiStep:
    """The learning rate times ``gamma`` from each epoch in ``milestones`` on (epochs counted from 0)."""

    milestones: tuple[int, ...]
    gamma: float = 0.1

    def __post_init__(self) -> None:
        if not isinstance(self.milestones, Sequence) or isinstance(self.milestones, str):
            raise UnmovedError(f"schedule.milestones: expected a list of epochs, came {self.milestones!r}")
        epochs = tuple(require_whole("schedule.milestones", epoch, at_least=0) for epoch in self.milestones)
        object.__setattr__(self, "milestones", epochs)
        number_field(self, "schedule.gamma", at_least=0)

    def __call__(self, optimizer: Optimizer, total: int, per_epoch: int) -> LRScheduler:
        return MultiStepLR(optimizer, [epoch * per_epoch for epoch in self.milestones], self.gamma)


@dataclass(frozen=True)
class Cosine:
    """From the optimizer's learning rate to zero along half a cosine."""

    def __call__(self, optimizer: Optimizer, total: int, per_epoch: int) -> LRScheduler:
        return CosineAnnealingLR(optimizer, T_max=total)


@dataclass(frozen=True)
class OneCycle:
    """`torch.optim.lr_scheduler.OneCycleLR` with the optimizer's learning rate as its peak, after ``warmup``.

    Args:
        warmup: the share of the training, in (0, 1), in which the rate rises.
        cycle_momentum: let the momentum, or Adam's beta_1, go from 0.95 to 0.85 at the peak and back, whatever the
            optimizer asks for (Smith 2018, torch's default). Otherwise the optimizer keeps its own.

    Raises:
        UnmovedError: a share outside (0, 1).
    """

    warmup: float = 0.3
    cycle_momentum: bool = False

    def __post_init__(self) -> None:
        flag_field(self, "schedule.cycle_momentum")
        number_field(self, "schedule.warmup", above=0, advice="it is a share of the training in (0, 1)")
        if self.warmup >= 1:
            raise UnmovedError(f"schedule.warmup: expected a share of the training in (0, 1), came {self.warmup!r}")

    def __call__(self, optimizer: Optimizer, total: int, per_epoch: int) -> LRScheduler:
        peaks = [group["lr"] for group in optimizer.param_groups]
        steps, warmup = total + 1, self.warmup
        if (
            warmup * steps == 1
        ):  # a rise of zero steps, by which torch would divide; a slightly smaller share starts at the peak
            warmup *= 1 - 1e-9
        return OneCycleLR(
            optimizer, max_lr=peaks, total_steps=steps, pct_start=warmup, cycle_momentum=self.cycle_momentum
        )


OPTIMIZERS = (SGD, Adam)
SCHEDULES = (Constant, Cosine, MultiStep, OneCycle)
