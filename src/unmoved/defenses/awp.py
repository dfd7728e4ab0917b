"""Defend by AWP: take gradient and step at adversarially moved weights, then move back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from unmoved.core import weights
from unmoved.core.phases import Ramp, number, ramp_field
from unmoved.defenses.plain import Plain


@dataclass(frozen=True)
class AWP:
    """Adversarial weight perturbation: gradient and step at weights moved against the model, then moved back.

    ``v_l = gamma ||w_l|| g_l / ||g_l||`` for each weight tensor; ``w <- step(w + v, grad L(w + v)) - v``. Wu et al.
    2020, equations (8)-(10), with the scope of the authors' code: tensors of more than one dimension (no biases, no
    normalisation), each with its own relative radius; the optimizer step, weight decay included, is taken at w + v.
    Two forward-backward passes. Running statistics of BatchNorm move in the second pass only, the one it steps from;
    buffers that depend on the weights, such as the vectors of spectral norm, in the first, at the uncorrupted ones.
    ``gamma = 0`` is `Plain`.

    Args:
        gamma: relative radius per tensor (the authors: 0.01 with AT, 0.005 with TRADES).

    Raises:
        UnmovedError: a negative gamma.

    Deviations: the direction comes from the model itself with frozen statistics instead of a proxy copy; weights are
    restored by adding the step's own change to the stored weights, so that a step of length zero changes no bit; a
    tensor's name does not count (the code asks for "weight" in it, and so leaves out position embeddings).
    """

    gamma: float | Ramp = 0.01

    def __post_init__(self) -> None:
        ramp_field(self, "AWP.gamma", at_least=0)

    def __call__(self, model: nn.Module, optimizer: Optimizer, backward: Callable[[], Tensor]) -> Tensor:
        if self.gamma == 0:
            return Plain()(model, optimizer, backward)
        gamma = number("AWP.gamma", self.gamma)
        tensors = [p for p in weights.trainable(model, optimizer) if p.ndim > 1]
        holders = weights.holders(model, tensors)
        optimizer.zero_grad(set_to_none=True)
        with weights.frozen_buffers(model, set(model.modules()).difference(holders)):
            loss = backward()
        moved = [p for p in tensors if p.grad is not None]
        gradients = [p.grad for p in moved if p.grad is not None]
        corruption = [gamma * p.detach().norm() * g / (g.norm() + 1e-20) for p, g in zip(moved, gradients, strict=True)]
        optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            before = [p.detach().clone() for p in moved]
            for p, v in zip(moved, corruption, strict=True):
                p.add_(v)
            torch.clear_autocast_cache()
            corrupted = [p.detach().clone() for p in moved]
        stepped = False
        try:
            with weights.frozen_buffers(model, set(holders)):
                backward()
            optimizer.step()
            stepped = True
        finally:
            with torch.no_grad():
                for p, old, bad in zip(moved, before, corrupted, strict=True):
                    p.copy_(old + (p - bad) if stepped else old)
                torch.clear_autocast_cache()
        return loss
