"""Hold the state that a training carries from epoch to epoch, save it into a run, and restore it from there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, TypeVar, cast

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.optim.optimizer import StateDict

from unmoved.core.errors import UnmovedError, is_want_of_memory
from unmoved.core.protocols import StatefulAttack
from unmoved.training import checkpoint, overfitting
from unmoved.training.log import EpochRecord
from unmoved.training.state import GoodState, SavedState, Settings, Tensors
from unmoved.training.store import Store

_EVERY_SAVE = 0.02  # least seconds of a save, which waits until its files are on disk


class Part(Protocol):
    """Anything whose state is saved and restored: a model, an optimizer, a schedule, an attack with memory."""

    def state_dict(self) -> StateDict: ...

    def load_state_dict(self, state_dict: StateDict, /) -> object: ...


class TrainerState:
    """Hold everything that resuming needs. ``trainer.pt`` is written last: a run resumes from it.

    Attributes:
        epochs: how many are done; ``saved_epochs`` of them are saved.
        log: their records.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        scheduler: LRScheduler,
        terms: nn.ModuleList,
        attacks: Sequence[object],
        run: Store | None,
        average: nn.Module | None = None,
        share: float = 1.0,
        settings: Settings | None = None,
    ) -> None:
        self.parts: dict[str, Part] = {"model": model, "optimizer": optimizer, "schedule": scheduler, "terms": terms}
        stateful_attacks = [attack for attack in attacks if isinstance(attack, StatefulAttack)]
        self.parts |= {f"attack {k}": attack for k, attack in enumerate(stateful_attacks)}
        self.kept = model if average is None else average  # the weights that are validated and judged
        self.parts |= {} if average is None else {"average": average}
        self.adversarial = bool(attacks)
        self.run, self.log, self.best = run, list[EpochRecord](), (-1.0, -1.0)
        self.epochs, self.saved_epochs, self.seconds = 0, 0, 0.0
        self.best_model: Tensors | None = None
        self._best_is_saved = True
        self._good: GoodState | None = None
        self._settings = settings
        self._share, self._budget = share, None if share < 1 else checkpoint.Budget(share, 0.0)

    def saved(self) -> SavedState | None:
        """Load the saved state with its records, or None; damaged files are logged and removed."""
        state = self.run.load_state(mend=True) if self.run is not None else None
        if self.run is None or state is None:
            return None
        return state | {"records": self.run.log.records(state["log"], state["epochs"])}

    def restore(self, saved: SavedState | None) -> None:
        """Resume from what `saved` returned, in this process or in the one that has the run; repair the run's files."""
        if saved is None:
            if self.run is not None:
                self.run.log.go_back(None, 1)
            return
        states: Mapping[str, Any] = saved
        try:
            for name, part in self.parts.items():
                part.load_state_dict(states[name])
            robust, clean = saved["best"]
            self.best, self.best_model = (robust, clean), saved["best_model"]
            self._good = saved.get("good")
            self.epochs, self.seconds = saved["epochs"], saved["record"]["seconds"]
            self.log = [*saved["records"], saved["record"]]
        except (AttributeError, KeyError, MemoryError, RuntimeError, TypeError, ValueError) as error:
            where = "the run's trainer.pt" if self.run is None else self.run.path / "trainer.pt"
            if is_want_of_memory(error):
                raise UnmovedError(
                    f"{where}: there is not enough memory to go on from this state, which is whole and was left as it "
                    "is; make room, then repeat the command"
                ) from error
            raise UnmovedError(
                f"{where}: the state of another model, optimizer or method "
                f"({type(error).__name__}: {str(error).splitlines()[0]}); delete trainer.pt and trainer.previous.pt to "
                "train this run from its start"
            ) from error
        self.saved_epochs = self.epochs
        if self.run is not None:
            self.run.mend_weights(saved)  # first, since only this can fail because a file is unreadable at the moment
            self.run.mend_log(saved)

    @property
    def is_stopped(self) -> bool:
        """Return whether the training has ended before its last epoch, for catastrophic overfitting."""
        return bool(self.log) and self.log[-1].get("stopped", False)

    def watch(self, record: EpochRecord, rule: str) -> EpochRecord:
        """Return the record of an epoch before it is committed, with its entries about overfitting added.

        A good epoch is remembered unless ``rule`` is "go_on"; with the other rules a fall restores the last good one.
        """
        fallen = overfitting.fall(self.log, record) if self.adversarial else None
        if fallen is None:
            if rule != overfitting.GO_ON and overfitting.is_good(self.log, record):
                states = {name: part.state_dict() for name, part in self.parts.items() if name != "schedule"}
                self._good = {"epoch": record["epoch"], "parts": _copied(states)}
            return record
        good = None if rule == overfitting.GO_ON else self._good
        if good is not None:
            self._go_back(good)
        record = {**record, "overfitting": fallen.words(rule, None if good is None else good["epoch"])}
        record = record if good is None else {**record, "back_to": good["epoch"]}
        return {**record, "stopped": True} if rule == overfitting.STOP else record

    def _go_back(self, good: GoodState) -> None:
        """Restore all parts but the schedule, which continues with the step numbers, so that later noise is new."""
        groups = self.parts["optimizer"].state_dict()["param_groups"]
        for name, state in _copied(good["parts"]).items():
            self.parts[name].load_state_dict(state | {"param_groups": groups} if name == "optimizer" else state)

    def commit(self, record: EpochRecord, seconds: float, *, last: bool = False) -> None:
        """Append an epoch to the log, and save if it is the ``last`` or a save is due.

        The best epoch is the first of the highest validation accuracy: robust, then clean; the other way round for a
        training without an attack, whose robust accuracy is noise near zero and would pick an epoch by chance.
        """
        robust, clean = record.get("validation_robust", -1.0), record.get("validation_clean", -1.0)
        score = (robust, clean) if self.adversarial else (clean, robust)
        is_best = not self.epochs or score > self.best or "validation_robust" not in record
        self.epochs, self.seconds = self.epochs + 1, self.seconds + seconds
        record = {**record, "kept": is_best, "seconds": self.seconds}
        self.log.append(record)
        if is_best:
            self.best, self.best_model, self._best_is_saved = score, None, False
        if self.run is None:
            return
        if self._budget is None:  # the first epoch: only now does the optimizer have state to be saved
            expected = _EVERY_SAVE + 2 * checkpoint.guessed(self._states())
            self._budget = checkpoint.Budget(self._share, expected, is_first=self.epochs == 1)
        if self._budget.allows(seconds) or last:
            with self._budget.spending():
                self._save(self.run, record)
        self.run.log.add(record)
        if is_best and not last and "validation_robust" in record:
            # A copy, since the model changes; best.safetensors can be repaired from it. Without validation the next
            # epoch is the best one anyway.
            self.best_model = {k: _copy(value) for k, value in self.kept.state_dict().items()}

    def _states(self) -> dict[str, Any]:
        states = {name: part.state_dict() for name, part in self.parts.items()}
        # If the best weights are the current ones, torch.save writes their memory once.
        best_model = dict(self.kept.state_dict()) if self.best_model is None else self.best_model
        good = {} if self._good is None else {"good": self._good}
        return states | good | {"best": list(self.best), "best_model": best_model}

    def _save(self, run: Store, record: EpochRecord) -> None:
        states: Any = self._states()
        settings = {} if self._settings is None else {"settings": self._settings}
        if not self._best_is_saved:
            run.save_weights(self.kept, "best", states["best_model"])
        run.save_weights(self.kept, "last")
        state: SavedState = states | settings | {"epochs": self.epochs, "record": record, "log": run.log.mark()}
        run.save_state(state)
        self.saved_epochs, self._best_is_saved = self.epochs, True


Value = TypeVar("Value")


def _copied(value: Value) -> Value:
    """Copy tensors in plain containers to the CPU."""
    made: Any = value
    if isinstance(value, Tensor):
        made = _copy(value)
    elif isinstance(value, dict):
        made = {key: _copied(part) for key, part in value.items()}
    elif isinstance(value, list | tuple):
        made = type(value)(_copied(part) for part in value)
    return cast(Value, made)


def _copy(value: Tensor) -> Tensor:
    return value.detach().cpu().clone()
