"""Check the arguments of a training before anything is built: data, method, lengths, functions of the user."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from unmoved.core.batch import Batch
from unmoved.core.errors import require_choice, require_seed, require_whole
from unmoved.core.phases import Phases
from unmoved.core.preconditions import require_callable
from unmoved.core.protocols import Split
from unmoved.data.augment import DrawsPartners
from unmoved.training import overfitting
from unmoved.training.averaging import Averaging
from unmoved.training.optim import Groups


@dataclass(frozen=True)
class Plan:
    """Hold the arguments of `train` that say what is done at each step.

    Attributes:
        phases: a method for each range of epochs.
        split: the training data.
        epochs: passes over it.
        batch_size: samples per step, over all processes together.
        optimizer: parameter groups -> optimizer, such as ``optim.SGD(lr=0.1)``. Parameters that it leaves out are
            constant: no defense moves them, and their ``.grad`` stays what it was.
        schedule: (optimizer, total steps, steps an epoch) -> scheduler, stepped once per optimizer step.
        augment: (batch, seed) -> batch; `CutMix` draws its partners from the split.
        average: `averaging.EMA` or `averaging.SWA`: validate, keep and return the averaged weights.
        seed: keys shuffling, augmentation and the model's own randomness; the caller's random state is left alone.
        on_overfitting: what to do when validation shows catastrophic overfitting: ``"go_on"`` (only log it), ``"stop"``
            with the weights of the last good epoch, or ``"go_back"`` to these weights and train from there for the
            remaining epochs, with new noise.

    Raises:
        UnmovedError: a number outside its bounds, a function that cannot be called, or a split without samples to
            draw partners from.
    """

    phases: Phases
    split: Split
    epochs: int
    batch_size: int
    optimizer: Callable[[Groups], Optimizer]
    schedule: Callable[[Optimizer, int, int], LRScheduler]
    augment: Callable[[Batch, int], Batch] | None
    average: Averaging | None
    seed: int
    on_overfitting: str = overfitting.GO_ON

    def __post_init__(self) -> None:
        for name, value in {
            "epochs": require_whole("epochs", self.epochs, at_least=1),
            "batch_size": require_whole("batch_size", self.batch_size, at_least=1),
            "seed": require_seed("seed", self.seed),
        }.items():
            object.__setattr__(self, name, value)
        require_choice("on_overfitting", self.on_overfitting, overfitting.RULES)
        require_callable("optimizer", self.optimizer, "groups")
        require_callable("schedule", self.schedule, "optimizer, total, per_epoch")
        if self.augment is not None:
            require_callable("augment", self.augment, "batch, seed")
        if isinstance(self.augment, DrawsPartners):
            object.__setattr__(self, "augment", self.augment.over(self.split))
        if self.average is not None:
            require_callable("average", self.average, "step, total")

    @property
    def steps_per_epoch(self) -> int:
        return -(-len(self.split) // self.batch_size)

    @property
    def steps(self) -> int:
        return self.epochs * self.steps_per_epoch

    def seed_of(self, epoch: int) -> int:
        """Return the seed of an epoch; those of neighbouring run seeds are far apart."""
        return (self.seed * 1_000_003 + epoch) % 2**63
