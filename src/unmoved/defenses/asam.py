"""Defend by adaptive SAM: measure sharpness in units of each weight."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from unmoved.core import weights
from unmoved.core.errors import number_field
from unmoved.core.phases import Ramp, number, ramp_field
from unmoved.defenses.plain import Plain


@dataclass(frozen=True)
class ASAM:
    """Adaptive sharpness-aware minimisation: `SAM` in the metric of the weights' own size.

    ``e = rho T^2 g / ||T g||_2`` with ``T = |w| + eta`` for parameters named "weight" and 1 for the rest;
    ``w <- step(w, grad L(w + e))``. Kwon et al. 2021, algorithm 1, with the scope of the authors' code. Two
    forward-backward passes. ``rho = 0`` is `Plain`.

    Args:
        rho: radius in the scaled metric (0.5 in the authors' code).
        eta: keeps T away from zero (0.01 there).

    Raises:
        UnmovedError: a negative value.

    Deviations: running statistics of BatchNorm move in the uncorrupted pass only (the authors' move twice).
    """

    rho: float | Ramp = 0.5
    eta: float = 0.01

    def __post_init__(self) -> None:
        ramp_field(self, "ASAM.rho", at_least=0)
        number_field(self, "ASAM.eta", at_least=0)

    def __call__(self, model: nn.Module, optimizer: Optimizer, backward: Callable[[], Tensor]) -> Tensor:
        if self.rho == 0:
            return Plain()(model, optimizer, backward)
        optimizer.zero_grad(set_to_none=True)
        loss = backward()
        owned = {id(p) for p in weights.trainable(model, optimizer)}
        named = [(name, p) for name, p in model.named_parameters() if id(p) in owned and p.grad is not None]
        scales = [p.detach().abs() + self.eta if "weight" in name else torch.ones_like(p) for name, p in named]
        scaled = [t * p.grad for t, (_, p) in zip(scales, named, strict=True) if p.grad is not None]
        factor = number("ASAM.rho", self.rho) / (weights.norm(scaled) + 1e-16)
        corruption = [factor * t * tg for t, tg in zip(scales, scaled, strict=True)]
        optimizer.zero_grad(set_to_none=True)
        with weights.perturbed([p for _, p in named], corruption), weights.frozen_buffers(model):
            backward()
        optimizer.step()
        return loss
