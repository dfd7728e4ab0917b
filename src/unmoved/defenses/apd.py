"""Defend by APD: take the mean risk over several adversarial corruptions of the weights."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from unmoved.core import weights
from unmoved.core.errors import flag_field, number_field, require_choice, whole_field
from unmoved.core.phases import Ramp, number, ramp_field
from unmoved.defenses.plain import Plain


@dataclass(frozen=True)
class APD:
    """Multi-step adversarial corruption of all weights as one vector, and the average risk along its path.

    ``a_0 = 0``, ``a_t = project(a_{t-1} + steepest(grad L(w + a_{t-1}), alpha))`` on the same batch, and
    ``w <- step(w, 1/(K+1) sum_{t=0..K} grad L(w + a_t))``. Zhang et al. 2021 (arXiv 2109.02889); the equal weights,
    K = 2 and alpha = 1.5 eps / K are the practice of the authors' group's code, not stated defaults of the paper.
    K + 1 forward-backward passes. The corruption is taken as constant (no second-order term). Running statistics of
    BatchNorm move in the uncorrupted pass only. ``eps = 0`` is `Plain`.

    Args:
        eps: radius of the ball, absolute or, with ``relative``, times the l2 norm of all weights.
        steps: K.
        p: 2 or inf, the norm of the ball.
        n: at most this many corrupted weights; None for all.
        risk: ``"mean"`` over the uncorrupted and all K corrupted points; ``"last"``: the last point alone (with one
            step that is SAM).
        step_size: alpha; None is 1.5 eps / K.
        relative: whether eps (and step_size) are in units of the weights' norm.

    Raises:
        UnmovedError: a value outside its bounds, or n above the number of weights.

    Deviations: with p = inf and n, where all entries of a step tie, the n of largest gradient move (the code keeps
    every tie, so nothing is sparse there).
    """

    eps: float | Ramp
    steps: int = 2
    p: float = 2
    n: int | None = None
    risk: str = "mean"
    step_size: float | None = None
    relative: bool = False

    def __post_init__(self) -> None:
        ramp_field(self, "APD.eps", at_least=0)
        whole_field(self, "APD.steps", at_least=1)
        require_choice("APD.p", self.p, (2, math.inf))
        flag_field(self, "APD.relative")
        require_choice("APD.risk", self.risk, ("mean", "last"))
        if self.n is not None:
            whole_field(self, "APD.n", at_least=1)
        if self.step_size is not None:
            number_field(self, "APD.step_size", at_least=0)

    def __call__(self, model: nn.Module, optimizer: Optimizer, backward: Callable[[], Tensor]) -> Tensor:
        if self.eps == 0:
            return Plain()(model, optimizer, backward)
        owned = [p for group in optimizer.param_groups for p in group["params"]]
        optimizer.zero_grad(set_to_none=True)
        loss = backward()
        moved = [p for p in weights.trainable(model, optimizer) if p.grad is not None]
        # The path is kept in units of the ball, so that the host need not read the weights' norm from the GPU.
        unit = weights.norm(p.detach() for p in moved) if self.relative else 1.0
        eps = number("APD.eps", self.eps)
        step_size = 1.5 * eps / self.steps if self.step_size is None else self.step_size
        total = [None if p.grad is None else p.grad.clone() for p in owned]
        corruption = [torch.zeros_like(p) for p in moved]
        for _ in range(self.steps):
            # In linf every entry of a step has the same size: there the largest gradients say which n move.
            sparse = self.n if self.p == math.inf else None
            ascent = weights.steepest([_gradient(p) for p in moved], step_size, self.p, sparse)
            corruption = [a + d for a, d in zip(corruption, ascent, strict=True)]
            corruption = weights.project(corruption, eps, self.p, self.n)
            optimizer.zero_grad(set_to_none=True)
            with weights.perturbed(moved, [unit * a for a in corruption]), weights.frozen_buffers(model):
                backward()
            total = [_add(sum_, p.grad) for sum_, p in zip(total, owned, strict=True)]
        if self.risk == "mean":
            for p, sum_ in zip(owned, total, strict=True):
                p.grad = None if sum_ is None else sum_ / (self.steps + 1)
        optimizer.step()
        return loss


def _gradient(p: Tensor) -> Tensor:
    return torch.zeros_like(p) if p.grad is None else p.grad


def _add(total: Tensor | None, gradient: Tensor | None) -> Tensor | None:
    if total is None or gradient is None:
        return total if gradient is None else gradient.clone()
    return total + gradient
