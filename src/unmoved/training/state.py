"""Define what ``trainer.pt`` holds, key by key: everything that a training needs to go on from an epoch."""

from __future__ import annotations

from typing import NotRequired, TypeAlias, TypedDict

from torch import Tensor
from torch.optim.optimizer import StateDict

from unmoved.training.log import EpochRecord, Mark

Tensors: TypeAlias = dict[str, Tensor]
Setting: TypeAlias = bool | int | float | str | list[float]


class Settings(TypedDict):
    """Hold the settings that a call which goes on from a state must share with the one that began.

    Attributes:
        epochs: as many as the training was to have; they and ``schedule`` may differ where the past does not.
        batch_size: images a step, of all processes together.
        samples: of the training data.
        optimizer: for each parameter group the optimizer's ``kind``, and its numbers before any schedule changed them.
        schedule: its kind and numbers in words.
    """

    epochs: int
    batch_size: int
    samples: int
    optimizer: list[dict[str, Setting]]
    schedule: str


class GoodState(TypedDict):
    """Hold the state of an epoch before a catastrophic overfitting.

    Attributes:
        epoch: its number, from 1.
        parts: the ``state_dict`` of each part but the schedule, by its name.
    """

    epoch: int
    parts: dict[str, StateDict]


class SavedState(TypedDict):
    """Hold the trainer's state after an epoch; and ``attack 0``, ``attack 1``, ..., those of attacks with memory.

    Attributes:
        model, optimizer, schedule, terms: their ``state_dict``.
        average: that of the averaged model, where there is one.
        good: the state of the last good epoch, where training may go back to it.
        best: the score of the best epoch, see `TrainerState.commit`.
        best_model: the weights of the best epoch.
        settings: of the call that saved; older versions saved none.
        epochs: how many are done.
        record: of the last of them.
        log: where the log stood before that record.
        records: those before it, which are read from the log and not saved again.
    """

    model: Tensors
    optimizer: StateDict
    schedule: StateDict
    terms: Tensors
    average: NotRequired[Tensors]
    good: NotRequired[GoodState | None]
    best: list[float]
    best_model: Tensors
    settings: NotRequired[Settings]
    epochs: int
    record: EpochRecord
    log: Mark
    records: NotRequired[list[EpochRecord]]
