"""What a training was asked to do, checked before anything is built: data, method, lengths, functions of the user."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from unmoved.core.batch import Batch
from unmoved.core.errors import require_seed, require_whole
from unmoved.core.phases import Phases
from unmoved.core.preconditions import require_callable
from unmoved.core.protocols import Split
from unmoved.training.averaging import Averaging


@dataclass(frozen=True)
class Plan:
    """The arguments of `train` that say what is done at each step; they are described there.

    Raises:
        UnmovedError: a number outside its bounds, or a function that is none.
    """

    phases: Phases
    split: Split
    epochs: int
    batch_size: int
    optimizer: Callable[[list[dict[str, Any]]], Optimizer]
    schedule: Callable[[Optimizer, int, int], LRScheduler]
    augment: Callable[[Batch, int], Batch] | None
    average: Averaging | None
    seed: int

    def __post_init__(self) -> None:
        for name, value in {
            "epochs": require_whole("epochs", self.epochs, at_least=1),
            "batch_size": require_whole("batch_size", self.batch_size, at_least=1),
            "seed": require_seed("seed", self.seed),
        }.items():
            object.__setattr__(self, name, value)
        require_callable("optimizer", self.optimizer, "groups")
        require_callable("schedule", self.schedule, "optimizer, total, per_epoch")
        if self.augment is not None:
            require_callable("augment", self.augment, "batch, seed")
        if self.average is not None:
            require_callable("average", self.average, "step, total")

    @property
    def steps_per_epoch(self) -> int:
        return -(-len(self.split) // self.batch_size)

    @property
    def steps(self) -> int:
        return self.epochs * self.steps_per_epoch

    def seed_of(self, epoch: int) -> int:
        """One seed per epoch, far apart for neighbouring run seeds."""
        return (self.seed * 1_000_003 + epoch) % 2**63
