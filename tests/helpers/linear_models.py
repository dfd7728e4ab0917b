"""Linear models in float64 whose nearest misclassified point is known, in closed form or by scipy."""

from __future__ import annotations

import math

import numpy as np
import torch
from scipy.optimize import linprog, minimize
from torch import Tensor, nn

from unmoved.core.batch import Batch

ORDER = {"linf": math.inf, "l2": 2.0, "l1": 1.0}
DUAL = {"linf": 1.0, "l2": 2.0, "l1": math.inf}


def linear(num_classes: int, *, seed: int = 0, n: int = 32) -> tuple[nn.Sequential, Batch]:
    """All boundaries meet in the middle of the box, and the images lie near to it."""
    draw = torch.Generator().manual_seed(seed)
    weight = torch.randn(num_classes, 16, generator=draw, dtype=torch.float64)
    model = with_weights(weight, -0.5 * weight.sum(1))
    x = 0.5 + 0.03 * torch.randn(n, 1, 4, 4, generator=draw, dtype=torch.float64)
    return model, Batch(x, model(x).argmax(1))


def on_faces(*, seed: int = 0, n: int = 12) -> tuple[nn.Sequential, Batch]:
    """Two classes; three pixels of four are exactly 0 or 1, and about half of these cannot go where they should."""
    draw = torch.Generator().manual_seed(seed)
    weight = torch.randn(16, generator=draw, dtype=torch.float64)
    x = torch.rand(n, 16, generator=draw, dtype=torch.float64)
    x = torch.where(torch.rand(n, 16, generator=draw) < 0.75, x.round(), x)
    model = with_weights(torch.stack([-weight, weight]) / 2, torch.zeros(2, dtype=torch.float64))
    with torch.no_grad():
        model[1].bias[1] = -(x @ weight).median() - 0.3
    x = x.reshape(n, 1, 4, 4)
    return model, Batch(x, model(x).argmax(1))


def with_weights(weight: Tensor, bias: Tensor) -> nn.Sequential:
    model = nn.Sequential(nn.Flatten(), nn.Linear(weight.shape[1], len(weight))).double()
    with torch.no_grad():
        model[1].weight.copy_(weight)
        model[1].bias.copy_(bias)
    return model.requires_grad_(False)


def nearest(model: nn.Sequential, batch: Batch, norm: str) -> Tensor:
    """``min_k (z_y - z_k) / ||w_y - w_k||_dual``, (B,): the distance where the box does not bind."""
    z, weight, y = model(batch.x), model[1].weight, batch.y
    gap = z.gather(1, y[:, None]) - z
    slope = torch.linalg.vector_norm(weight[y][:, None] - weight[None], ord=DUAL[norm], dim=2)
    return (gap / slope).scatter(1, y[:, None], torch.inf).min(dim=1).values


def nearest_in_the_box(model: nn.Sequential, batch: Batch, norm: str) -> Tensor:
    """The distance for two classes, by scipy: ``min ||d|| s.t. <w, d> >= margin, 0 <= x + d <= 1``, (B,)."""
    z, weight = model(batch.x), model[1].weight.numpy()
    found = []
    for x, y, logits in zip(batch.x.flatten(1).numpy(), batch.y.tolist(), z.numpy(), strict=True):
        w, margin = weight[1 - y] - weight[y], logits[y] - logits[1 - y]
        found.append(_shortest(w, margin, -x, 1 - x, norm))
    return torch.tensor(found, dtype=torch.float64)


def _shortest(w: np.ndarray, margin: float, low: np.ndarray, high: np.ndarray, norm: str) -> float:
    d, eye, one = len(w), np.eye(len(w)), np.ones((len(w), 1))
    if norm == "l2":
        rule = {"type": "ineq", "fun": lambda v: w @ v - margin, "jac": lambda v: w}
        start, box = np.zeros(d), list(zip(low, high, strict=True))
        best = minimize(lambda v: v @ v, start, jac=lambda v: 2 * v, bounds=box, constraints=rule, tol=1e-12)
        assert best.success
        return float(np.sqrt(best.fun))
    if norm == "linf":  # variables d and t, |d_i| <= t
        cost, box = np.r_[np.zeros(d), 1], [*zip(low, high, strict=True), (0, None)]
        rows = np.r_[np.c_[-w[None], 0], np.c_[eye, -one], np.c_[-eye, -one]]
    else:  # the positive and the negative part of d
        cost, box = np.ones(2 * d), [*((0, h) for h in high), *((0, -b) for b in low)]
        rows = np.r_[-w, w][None]
    best = linprog(cost, A_ub=rows, b_ub=np.r_[-margin, np.zeros(len(rows) - 1)], bounds=box)
    assert best.success
    return float(best.fun)


def distance(x_adv: Tensor, batch: Batch, norm: str) -> Tensor:
    return torch.linalg.vector_norm((x_adv - batch.x).flatten(1), ord=ORDER[norm], dim=1)


def deaf() -> nn.Module:
    """Always the first class, whatever it is shown."""
    return with_weights(torch.zeros(3, 16, dtype=torch.float64), torch.tensor([1.0, 0, 0], dtype=torch.float64))
