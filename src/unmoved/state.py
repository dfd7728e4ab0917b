"""What a training run remembers: the log, the best epoch, and everything that resuming needs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from unmoved.errors import UnmovedError, is_want_of_memory
from unmoved.protocols import StatefulAttack
from unmoved.run import Run


class TrainerState:
    """Everything that resuming needs. ``trainer.pt`` is written last, so it is the point a run comes back to."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        scheduler: LRScheduler,
        terms: nn.ModuleList,
        attacks: list[Any],
        run: Run | None,
        average: nn.Module | None = None,
    ) -> None:
        self.parts: dict[str, Any] = {"model": model, "optimizer": optimizer, "schedule": scheduler, "terms": terms}
        stateful_attacks = [attack for attack in attacks if isinstance(attack, StatefulAttack)]
        self.parts |= {f"attack {k}": attack for k, attack in enumerate(stateful_attacks)}
        self.kept = model if average is None else average  # the weights that are validated and judged
        self.parts |= {} if average is None else {"average": average}
        self.adversarial = bool(attacks)
        self.run, self.log, self.best = run, list[dict[str, Any]](), (-1.0, -1.0)
        self.best_model: dict[str, Any] | None = None

    def saved(self, tell: Callable[[str], None] = lambda words: None) -> dict[str, Any] | None:
        """What the run saved, or None; what was damaged on disk is told, and removed."""
        return self.run.load_state(tell, mend=True) if self.run is not None else None

    def restore(self, saved: dict[str, Any] | None, tell: Callable[[str], None] = lambda words: None) -> None:
        """Go on from what `saved` returned, here or in the process that has the run; weights files are mended."""
        if saved is None:
            return
        try:
            for name, part in self.parts.items():
                part.load_state_dict(saved[name])
            self.log, self.best = saved["log"], tuple(saved["best"])
            self.best_model = saved.get("best_model")  # older versions kept none
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
        if self.run is not None:
            self.run.mend_weights(saved, tell)

    def commit(self, record: dict[str, Any], seconds: float) -> None:
        """Append an epoch to the log; the best epoch is the first of the highest validation accuracy.

        Robust accuracy, then clean; the other way round for a training without an attack, whose robust accuracy is
        noise near zero and would pick an epoch by chance.
        """
        elapsed = self.log[-1]["seconds"] if self.log else 0.0
        robust, clean = record.get("validation_robust", -1.0), record.get("validation_clean", -1.0)
        score = (robust, clean) if self.adversarial else (clean, robust)
        is_best = not self.log or score > self.best or "validation_robust" not in record
        self.log.append(record | {"kept": is_best, "seconds": elapsed + seconds})
        self.best = score if is_best else self.best
        if self.run is not None:
            if is_best:
                # A copy: the model moves on, and best.safetensors can be mended from it.
                self.best_model = {k: _copy(value) for k, value in self.kept.state_dict().items()}
                self.run.save_weights(self.kept, "best")
            self.run.save_weights(self.kept, "last")
            self.run.save_metrics(self.log)
            state = {name: part.state_dict() for name, part in self.parts.items()}
            kept = {"log": self.log, "best": list(self.best), "best_model": self.best_model}
            self.run.save_state(state | kept)


def _copy(value: Any) -> Any:
    return value.detach().cpu().clone() if isinstance(value, Tensor) else value


class Means:
    """Means over samples, not over batches: the last batch may be smaller."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.count = 0

    def add(self, values: dict[str, Tensor], parts: dict[str, Tensor], size: int) -> None:
        for name, value in (values | {f"parts.{name}": part for name, part in parts.items()}).items():
            self.sums[name] = self.sums.get(name, 0.0) + value.double() * size
        self.count += size

    def means(self, summed: Callable[[Tensor], Tensor] = lambda sums: sums) -> dict[str, Any]:
        """The means; ``summed`` adds up what several processes saw."""
        device = next(iter(self.sums.values())).device
        sums = summed(torch.stack([torch.tensor(float(self.count), device=device), *self.sums.values()]).double())
        flat = dict(zip(self.sums, (sums[1:] / sums[0]).tolist(), strict=True))
        parts = {name.removeprefix("parts."): flat.pop(name) for name in list(flat) if name.startswith("parts.")}
        return {**flat, "parts": parts}
