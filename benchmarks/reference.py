"""A plain reference of the training steps, which does what the papers' code does and nothing more.

float32, contiguous, eager; TRADES' clean logits are computed again in each inner step, AWP works on a copy of the
model, and no sample is left out when it has stopped. Written for timing, from the equations.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Loss = Callable[[Tensor], Tensor]
TINY = 1e-12


def ascend(model: nn.Module, x: Tensor, x_adv: Tensor, loss: Loss, eps: float, steps: int) -> Tensor:
    """``steps`` signed steps of 2.5 eps / steps in the linf ball, the model in evaluation mode."""
    model.eval()
    for _ in range(steps):
        x_adv.requires_grad_()
        with torch.enable_grad():
            value = loss(x_adv)
        grad = torch.autograd.grad(value, x_adv)[0]
        x_adv = x_adv.detach() + 2.5 * eps / steps * grad.sign()
        x_adv = torch.min(torch.max(x_adv, x - eps), x + eps).clamp(0, 1)
    model.train()
    return x_adv.detach()


def uniform(x: Tensor, eps: float) -> Tensor:
    return (x + torch.empty_like(x).uniform_(-eps, eps)).clamp(0, 1).detach()


def gaussian(x: Tensor) -> Tensor:
    return x.detach() + 0.001 * torch.randn_like(x)


def trades_attack(model: nn.Module, x: Tensor, eps: float, steps: int) -> Tensor:
    def kl(x_adv: Tensor) -> Tensor:
        return F.kl_div(F.log_softmax(model(x_adv), 1), F.softmax(model(x), 1), reduction="sum")

    return ascend(model, x, gaussian(x), kl, eps, steps)


def ce_attack(model: nn.Module, x: Tensor, y: Tensor, start: Tensor, eps: float, steps: int) -> Tensor:
    return ascend(model, x, start, lambda x_adv: F.cross_entropy(model(x_adv), y), eps, steps)


def trades_loss(model: nn.Module, x: Tensor, x_adv: Tensor, y: Tensor, beta: float = 6.0) -> Tensor:
    natural = F.cross_entropy(model(x), y)
    robust = F.kl_div(F.log_softmax(model(x_adv), 1), F.softmax(model(x), 1), reduction="sum") / len(x)
    return natural + beta * robust


def at(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor, eps: float, steps: int) -> None:
    x_adv = ce_attack(model, x, y, uniform(x, eps), eps, steps)
    optimizer.zero_grad()
    F.cross_entropy(model(x_adv), y).backward()
    optimizer.step()


def trades(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor, eps: float, steps: int) -> None:
    x_adv = trades_attack(model, x, eps, steps)
    optimizer.zero_grad()
    trades_loss(model, x, x_adv, y).backward()
    optimizer.step()


def mart(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor, eps: float, steps: int) -> None:
    x_adv = ce_attack(model, x, y, gaussian(x), eps, steps)
    optimizer.zero_grad()
    clean, adversarial = model(x), model(x_adv)
    p, q = F.softmax(clean, 1), F.softmax(adversarial, 1)
    wrong = torch.where(F.one_hot(y, p.shape[1]).bool(), -1.0, q).amax(dim=1)
    boosted = F.cross_entropy(adversarial, y) + F.nll_loss(torch.log(1.0001 - wrong + TINY)[:, None], 0 * y)
    kl = F.kl_div(torch.log(q + TINY), p, reduction="none").sum(dim=1)
    true = p.gather(1, y[:, None]).squeeze(1)
    (boosted + 6.0 * (kl * (1.0000001 - true)).mean()).backward()
    optimizer.step()


def trades_awp(
    model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor, eps: float, steps: int
) -> None:
    """With a proxy copy, as the authors' code: one step of ascent on it gives the direction, layer by layer."""
    x_adv = trades_attack(model, x, eps, steps)
    proxy = copy.deepcopy(model).train()
    ascent = torch.optim.SGD(proxy.parameters(), lr=0.01)
    (-trades_loss(proxy, x, x_adv, y)).backward()
    ascent.step()
    moved = []
    with torch.no_grad():
        for p, q in zip(model.parameters(), proxy.parameters(), strict=True):
            if p.ndim > 1:
                d = q - p
                moved.append((p, 0.005 * p.norm() / (d.norm() + 1e-20) * d))
        for p, v in moved:
            p.add_(v)
    optimizer.zero_grad()
    trades_loss(model, x, x_adv, y).backward()
    optimizer.step()
    with torch.no_grad():
        for p, v in moved:
            p.sub_(v)


def sense(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor, eps: float, steps: int) -> None:
    """Every step computes the whole batch; a sample whose p_y would fall below c keeps its point."""
    model.eval()
    x_adv, moving = uniform(x, eps), torch.ones(len(x), dtype=torch.bool)
    for _ in range(steps):
        x_adv.requires_grad_()
        grad = torch.autograd.grad(F.cross_entropy(model(x_adv), y), x_adv)[0]
        step = x_adv.detach() + 2.5 * eps / steps * grad.sign()
        step = torch.min(torch.max(step, x - eps), x + eps).clamp(0, 1)
        with torch.no_grad():
            p = F.softmax(model(step), 1).gather(1, y[:, None]).squeeze(1)
        moving &= p >= 0.5
        x_adv = torch.where(moving[:, None, None, None], step, x_adv.detach())
    model.train()
    optimizer.zero_grad()
    F.cross_entropy(model(x_adv.detach()), y).backward()
    optimizer.step()


def apd(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor, eps: float, steps: int) -> None:
    """The mean gradient over the clean weights and two corrupted ones, on attacked images."""
    x_adv = ce_attack(model, x, y, uniform(x, eps), eps, steps)
    params = list(model.parameters())
    kept = [p.detach().clone() for p in params]
    corruption, total = [torch.zeros_like(p) for p in params], [torch.zeros_like(p) for p in params]
    radius, passes = 0.01 * torch.cat([p.flatten() for p in kept]).norm(), 2
    for k in range(passes + 1):
        model.zero_grad()
        F.cross_entropy(model(x_adv), y).backward()
        grads = [p.grad.clone() for p in params if p.grad is not None]
        total = [t + g / (passes + 1) for t, g in zip(total, grads, strict=True)]
        if k < passes:
            length = torch.cat([g.flatten() for g in grads]).norm()
            corruption = [a + 1.5 * radius / passes * g / length for a, g in zip(corruption, grads, strict=True)]
            size = torch.cat([a.flatten() for a in corruption]).norm()
            corruption = [a * min(1.0, float(radius / size)) for a in corruption]
            with torch.no_grad():
                for p, w, a in zip(params, kept, corruption, strict=True):
                    p.copy_(w + a)
    with torch.no_grad():
        for p, w, t in zip(params, kept, total, strict=True):
            p.copy_(w)
            p.grad = t
    optimizer.step()


STEPS = {"AT": at, "TRADES": trades, "MART": mart, "TRADES-AWP": trades_awp, "SENSE": sense, "APD": apd}
