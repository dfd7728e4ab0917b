"""Define stopping rules: when PGD has gone far enough with a sample."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from unmoved.core.batch import Label, Logits, PerSample
from unmoved.core.errors import flag_field, number_field, whole_field
from unmoved.core.protocols import Term
from unmoved.terms import CE


class StoppingRule(Protocol):
    """Decide which samples stop; they are not attacked further, and stay in the training loss."""

    @property
    def undo(self) -> bool:
        """Return whether the step that made a sample stop is taken back; the last point is then judged as well."""

    @property
    def inert(self) -> bool:
        """Return whether the rule never allows a step, so that the attack returns the clean image."""

    @property
    def opening(self) -> Term | None:
        """Return the loss of the start and the first step if it differs from the attack's own; otherwise None."""

    @property
    def jitter(self) -> float:
        """Return the standard deviation of the noise added to each step."""

    def __call__(
        self, logits: Logits, y: Label, value: PerSample, step: int, memory: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Judge the points before step number ``step``.

        Args:
            logits: (B, K) at the point.
            y: (B,) labels.
            value: (B,) the loss there.
            step: steps taken so far; 0 is the start.
            memory: what the last call returned for these samples, (B, ...) tensor or None.

        Returns:
            (B,) bool, True where the sample stops now; and the memory for the next call.
        """


@dataclass(frozen=True)
class Sensible:
    """The sensible adversary: a step that carries the loss above ``-log c`` is taken back and the sample frozen.

    A sample that is misclassified, or whose p_y is below c, at the noisy start stays there. So no attacked sample has
    a loss above ``-log c`` ("implicit loss truncation"): Kim and Wang 2022/2023 (SENSE), as in the authors' code.
    With ``loss=KL()`` the start and the first step go by cross-entropy, the rest by KL with the same threshold.

    Args:
        c: confidence in (0, 1] below which a perturbation is not sensible; 1 is natural training.
        adaptive: ``False`` is the authors' warm-up: only the start is judged, all others get the whole attack.

    Raises:
        UnmovedError: c outside (0, 1].

    Deviations: with ``loss=KL()`` the clean logits are computed in the attack's mode, as a rule evaluation (in the code
    in training mode).
    """

    c: float = 0.5
    adaptive: bool = True

    def __post_init__(self) -> None:
        number_field(self, "Sensible.c", above=0, at_most=1)
        flag_field(self, "Sensible.adaptive")

    undo = True
    jitter = 0.0

    @property
    def inert(self) -> bool:
        return self.c == 1

    @property
    def opening(self) -> Term:
        return CE("adv")

    def __call__(
        self, logits: Logits, y: Label, value: PerSample, step: int, memory: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        beyond = value > -math.log(self.c)
        if step == 0:
            return beyond | (logits.argmax(dim=1) != y), None
        return beyond if self.adaptive else torch.zeros_like(beyond), None


@dataclass(frozen=True)
class Friendly:
    """The friendly adversary: a sample stops ``tau`` steps after it is first seen misclassified.

    Zhang et al. 2020 (FAT), algorithm 1, with the budget as in the authors' code: each point that is seen wrong while
    budget is left costs one of the ``tau`` and the attack goes on; at zero the wrong point itself is kept.

    Args:
        tau: steps allowed after the boundary, 0 or more.
        omega: standard deviation of the noise added to each step (0.001 in FAT, 0 with TRADES and MART).

    Raises:
        UnmovedError: a negative value.

    Deviations: the noise is added to the projected step and projected again (the code projects step and noise once).
    """

    tau: int = 0
    omega: float = 0.0

    def __post_init__(self) -> None:
        whole_field(self, "Friendly.tau", at_least=0)
        number_field(self, "Friendly.omega", at_least=0)

    undo = False
    inert = False
    opening = None

    @property
    def jitter(self) -> float:
        return self.omega

    def __call__(
        self, logits: Logits, y: Label, value: PerSample, step: int, memory: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        left = torch.full_like(y, self.tau) if memory is None else memory
        wrong = logits.argmax(dim=1) != y
        return wrong & (left == 0), left - (wrong & (left > 0)).long()
