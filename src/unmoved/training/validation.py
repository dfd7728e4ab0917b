"""Measure clean and robust accuracy on held-out data after each epoch, by which the best epoch is picked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, TypedDict

import torch
from torch import nn

from unmoved.attacks import PGD
from unmoved.core.errors import UnmovedError
from unmoved.core.preconditions import require_callable, require_split
from unmoved.core.protocols import Attack, Split, require_in_ball
from unmoved.core.threat import ThreatModel, require_threat
from unmoved.evaluation import judge, outcomes
from unmoved.training import distributed

if TYPE_CHECKING:
    from lightning_fabric import Fabric


class Accuracies(TypedDict):
    """Hold accuracies in [0, 1] on ``validation_n`` held-out samples, under the names of `EpochRecord`."""

    validation_clean: float
    validation_robust: float
    validation_chance: float
    validation_n: int


@dataclass(frozen=True)
class Validation:
    """Hold the validation data, the attack on it, and the threat model."""

    split: Split
    check: Attack
    threat: ThreatModel

    @classmethod
    def of(
        cls, split: Split | None, check: Attack | None, threat: ThreatModel | None, order: str = "validation"
    ) -> Validation | None:
        """Make a validation from the arguments of `train`; None without data. The default attack is a 10-step PGD.

        Args:
            order: the call with its arguments in order, which messages show.

        Raises:
            UnmovedError: data without a threat model, or arguments of other kinds.
        """
        if split is not None:
            require_split(split, order)
            if threat is None:
                raise UnmovedError("train: validation needs the threat model to judge by; pass threat=ThreatModel(...)")
            check = PGD(threat, keep="best") if check is None else check
        if check is not None:
            require_callable("check", check, "model, batch")
            require_in_ball("check", check)
        if threat is not None:
            require_threat("threat", threat)
        return None if split is None or check is None or threat is None else cls(split, check, threat)

    def accuracy(self, model: nn.Module, batch_size: int, fabric: Fabric) -> Accuracies:
        """Measure both accuracies; if samples of the split can be selected, processes share them.

        Raises:
            UnmovedError: as `judge.evaluate`.
        """
        n, count, select = len(self.split), fabric.world_size, getattr(self.split, "select", None)
        divided = select is not None and 1 < count <= n
        part = select(torch.arange(fabric.global_rank, n, count)) if select is not None and divided else self.split
        table = judge.evaluate(model, part, {"validation": self.check}, self.threat, batch_size=batch_size)
        accuracy = outcomes.summary(table).set_index("measure")["accuracy"]
        most = int(table["label"].value_counts().max())
        counts = [*(round(accuracy[name] * len(part)) for name in ("clean", "validation")), most]
        right = torch.tensor(counts, dtype=torch.float64)
        if divided:
            right = distributed.summed(fabric, right.to(fabric.device))
        clean, robust, chance = (right / n).tolist()
        return {
            "validation_clean": clean, "validation_robust": robust, "validation_chance": chance, "validation_n": n
        }  # fmt: skip
