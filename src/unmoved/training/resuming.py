"""Check whether an interrupted training may go on with the settings of a new call."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.optim.optimizer import StateDict

from unmoved.core.errors import UnmovedError
from unmoved.core.phases import Phases
from unmoved.training.state import SavedState, Setting, Settings

_NOT_SETTINGS = ("params", "foreach", "fused", "capturable")  # and how torch computes a step
Share = Callable[[int, int], float]


def groups_of(optimizer: Optimizer) -> list[dict[str, Setting]]:
    """Describe the parameter groups of an optimizer: its kind, and the numbers of each."""
    return [{"kind": type(optimizer).__name__} | _numbers(group) for group in optimizer.param_groups]


def name_of(scheduler: LRScheduler) -> str:
    """Describe a new schedule by its kind and numbers."""
    return f"{type(scheduler).__name__} {sorted(scheduler.state_dict().items())!r}"


def followed(
    saved: SavedState,
    settings: Settings,
    *,
    optimizer: Optimizer,
    scheduler: LRScheduler,
    steps: int,
    phases: Phases,
    average: Share | None,
    where: str,
) -> SavedState:
    """Return the saved state with the schedule of this call, after checking that this call may resume from it.

    Args:
        saved: the state, with the settings of the call that began the run; nothing is checked without them.
        settings, phases, average: of this call.
        optimizer, scheduler: of this call, new.
        steps: per epoch.
        where: the run, for messages.

    Raises:
        UnmovedError: a batch size, optimizer, rate or number of samples that differs; more epochs, or another schedule,
            under which the epochs that are trained would have been trained otherwise.
    """
    before, done = saved.get("settings"), saved["epochs"]
    if before is None:
        return saved
    try:
        require_same(before, settings, done, where)
        if (before["epochs"], before["schedule"]) == (settings["epochs"], settings["schedule"]):
            return saved
        require_same_past(phases, average, done, steps, (before["epochs"], settings["epochs"]), where)
        return saved | {"schedule": follow_schedule(saved["optimizer"], done, steps, optimizer, scheduler, where)}
    except (AttributeError, KeyError, TypeError) as error:
        raise UnmovedError(f"{where}: trainer.pt holds no settings of a training ({error!r}); train again") from error


def require_same(saved: Settings, now: Settings, done: int, where: str) -> None:
    """Raise `UnmovedError` if a call cannot go on after ``done`` epochs of another.

    Args:
        saved: settings of the call that began the run.
        now: settings of this call.
        where: the run, for messages.
    """
    was, new = _flat(saved), _flat(now)
    differing = [f"{key} = {was.get(key)!r}, came {new.get(key)!r}" for key in new if was.get(key) != new.get(key)]
    if differing:
        raise UnmovedError(
            f"{where}: its first {done} epochs were trained with {'; '.join(differing)}; pass what it was begun with, "
            "or begin another run"
        )
    if now["epochs"] < done:
        raise UnmovedError(f"{where}: {done} epochs are trained already, came epochs = {now['epochs']}; ask for more")


def follow_schedule(
    saved: StateDict, done: int, steps: int, optimizer: Optimizer, scheduler: LRScheduler, where: str
) -> StateDict:
    """Return the state of this call's schedule after ``done`` epochs of ``steps`` steps, which must fit the saved run.

    Args:
        saved: state of the saved optimizer.
        optimizer: that of this call, new; the schedule changes its numbers, and no step is taken.
        scheduler: its schedule, new.
        where: the run, for messages.

    Raises:
        UnmovedError: this schedule would have led to other numbers by now, so that the learning rate would jump.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch wants the optimizer to step, too
        try:
            for _ in range(done * steps):
                scheduler.step()
        except ValueError as error:  # of a schedule that has an end
            raise UnmovedError(
                f"{where}: this call's schedule ends before the {done} epochs that are trained"
            ) from error
    for group, other in zip(saved["param_groups"], optimizer.param_groups, strict=False):
        was, new = _numbers(group), _numbers(other)
        for key in was:
            if key in ("lr", "momentum", "betas", "weight_decay") and not _close(was[key], new.get(key)):
                raise UnmovedError(
                    f"{where}: after its {done} epochs {key} is {_short(was[key])}, where the schedule of this call, "
                    f"over its own number of epochs, has {_short(new.get(key))}; ask for the schedule "
                    "and the epochs of the first call, or begin another run"
                )
    return scheduler.state_dict()


def require_same_past(
    phases: Phases, average: Share | None, done: int, steps: int, epochs: tuple[int, int], where: str
) -> None:
    """Raise `UnmovedError` if ramps or the average would have been different so far with this number of epochs.

    Args:
        epochs: (of the call that began, of this one).
        where: the run.
    """
    before, now = (phases.at(done, total) for total in epochs)
    what = "the ramps" if before is not now and repr(before) != repr(now) else ""
    if average is not None and any(
        average(step, epochs[0] * steps) != average(step, epochs[1] * steps) for step in range(done * steps)
    ):
        what = "the average"
    if what:
        raise UnmovedError(
            f"{where}: {what} of a training of {epochs[0]} epochs stand elsewhere after {done} of them than those of "
            f"one of {epochs[1]}; ask for epochs = {epochs[0]}, or begin another run"
        )


def _numbers(group: StateDict) -> dict[str, Setting]:
    """Return the settings of a parameter group: numbers, and pairs of them."""
    plain = {key: value.tolist() if isinstance(value, Tensor) else value for key, value in group.items()}
    plain = {key: list(value) if isinstance(value, tuple) else value for key, value in plain.items()}
    return {k: v for k, v in plain.items() if k not in _NOT_SETTINGS and isinstance(v, bool | int | float | list)}


def _flat(settings: Settings) -> dict[str, Setting]:
    """Return settings under the names that messages use; epochs are compared by themselves."""
    many = len(settings["optimizer"]) > 1
    flat: dict[str, Setting] = {"batch_size": settings["batch_size"], "number of samples": settings["samples"]}
    for k, group in enumerate(settings["optimizer"]):
        name = f"optimizer group {k}" if many else "optimizer"
        flat |= {name if key == "kind" else f"{name} {key}": value for key, value in group.items()}
    return flat


def _close(was: Setting, new: Setting | None) -> bool:
    if isinstance(was, list) and isinstance(new, list):
        return all(map(_close, was, new))
    if isinstance(was, int | float) and isinstance(new, int | float):
        return math.isclose(was, new, rel_tol=1e-9)
    return was == new


def _short(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
