"""Defend by SAM: take the gradient at the worst weights nearby, and the step at the weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn
from torch.optim import Optimizer

from unmoved.core import weights
from unmoved.core.phases import Ramp, number, ramp_field
from unmoved.defenses.plain import Plain


@dataclass(frozen=True)
class SAM:
    """Sharpness-aware minimisation: the gradient at the worst weights within an l2 ball, the step at the weights.

    ``e = rho g / ||g||_2`` over all parameters as one vector; ``w <- step(w, grad L(w + e))``. Foret et al. 2021,
    equations (1)-(3), algorithm 1. Two forward-backward passes. Running statistics of BatchNorm move in the first,
    uncorrupted pass only. ``rho = 0`` is `Plain`.

    Args:
        rho: absolute l2 radius (0.05 is the authors' advice).

    Raises:
        UnmovedError: a negative rho.
    """

    rho: float | Ramp = 0.05

    def __post_init__(self) -> None:
        ramp_field(self, "SAM.rho", at_least=0)

    def __call__(self, model: nn.Module, optimizer: Optimizer, backward: Callable[[], Tensor]) -> Tensor:
        if self.rho == 0:
            return Plain()(model, optimizer, backward)
        optimizer.zero_grad(set_to_none=True)
        loss = backward()
        moved = [p for p in weights.trainable(model, optimizer) if p.grad is not None]
        gradients = [p.grad.clone() for p in moved if p.grad is not None]
        scale = number("SAM.rho", self.rho) / weights.norm(gradients).clamp_min(1e-12)
        optimizer.zero_grad(set_to_none=True)
        with weights.perturbed(moved, [scale * g for g in gradients]), weights.frozen_buffers(model):
            backward()
        optimizer.step()
        return loss
