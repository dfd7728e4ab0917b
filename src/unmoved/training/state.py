"""Define what ``trainer.pt`` holds, key by key: everything that a training needs to resume from an epoch."""

from __future__ import annotations

from typing import NotRequired, TypeAlias, TypedDict

from torch import Tensor
from torch.optim.optimizer import StateDict

from unmoved.training.log import EpochRecord, Mark

Tensors: TypeAlias = dict[str, Tensor]
Setting: TypeAlias = bool | int | float | str | list[float]


class Settings(TypedDict):
    """Hold the settings that a call which resumes must share with the call that began the training.

    Attributes:
        epochs: planned in all; they and ``schedule`` may differ if the epochs done so far would have been the same.
        batch_size: images per step, over all processes together.
        samples: size of the training data.
        optimizer: for each parameter group the optimizer's ``kind``, and its numbers before any schedule changed them.
        schedule: its kind and numbers, as `resuming.name_of` describes them.
    """

    epochs: int
    batch_size: int
    samples: int
    optimizer: list[dict[str, Setting]]
    schedule: str


class GoodState(TypedDict):
    """Hold the state of the last good epoch, from before catastrophic overfitting.

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
        average: the ``state_dict`` of the averaged model, if there is one.
        good: the state of the last good epoch, if training may go back to it.
        best: the score of the best epoch, see `TrainerState.commit`.
        best_model: the weights of the best epoch.
        settings: those of the call that saved; older versions saved none.
        epochs: the number of epochs done.
        record: the record of the last of them.
        log: the mark of the log before that record.
        records: the records before it, which are read from the log and not saved here.
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
