"""Minimum-norm attacks on a linear model in a box: how far they are from the closed form, image by image."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_box import BOUNDS, NORMS, Score

from unmoved.attacks import CW, FAB, FMN, DeepFool
from unmoved.core.batch import Batch
from unmoved.core.threat import ThreatModel


def corner(bounds: tuple[float, float], n: int = 24, d: int = 36) -> tuple[Score, Batch, torch.Tensor]:
    """A model, images of which nine pixels of ten stand at an edge, and the direction (n, d) to the boundary."""
    draw = torch.Generator().manual_seed(4)
    low, high = bounds
    model = Score(torch.randn(d, generator=draw, dtype=torch.float64) / (high - low))
    x = torch.rand(n, d, generator=draw, dtype=torch.float64)
    x = low + (high - low) * torch.where(torch.rand(n, d, generator=draw) < 0.9, x.round(), x)
    batch = Batch(x.reshape(n, 1, 6, -1), model(x).argmax(dim=1))
    return model, batch, model.weight * torch.where(batch.y == 1, -1.0, 1.0)[:, None]


def shortest(x: torch.Tensor, direction: torch.Tensor, needed: torch.Tensor, norm: str, bounds: Any) -> torch.Tensor:
    """min ||d|| with <direction, d> >= needed and x + d in the box, one sample after another, (n,)."""
    low, high = bounds
    room, slope = torch.where(direction > 0, high - x, x - low), direction.abs()
    if norm == "l1":  # a fractional knapsack: steepest pixels first, each as far as it has room
        distances = []
        for one_slope, one_room, one_needed in zip(slope.tolist(), room.tolist(), needed.tolist(), strict=True):
            left, distance = one_needed, 0.0
            for steep, space in sorted(zip(one_slope, one_room, strict=True), reverse=True):
                step = min(left / steep, space)
                left, distance = left - steep * step, distance + step
            distances.append(distance)
        return torch.tensor(distances, dtype=x.dtype)

    def step(t: torch.Tensor) -> torch.Tensor:  # the optimum has this shape, by its conditions; t is a multiplier
        return torch.minimum(room, t if norm == "linf" else t * slope)

    under, over = torch.zeros_like(needed)[:, None], (room / slope).amax(dim=1, keepdim=True) + high - low
    for _ in range(200):
        middle = (under + over) / 2
        enough = ((slope * step(middle)).sum(dim=1) >= needed)[:, None]
        under, over = torch.where(enough, under, middle), torch.where(enough, middle, over)
    return over.squeeze(1) if norm == "linf" else step(over).norm(dim=1)


# What of the shortest distance the attack may need: the median image, and the worst one.
ATTACKS = [
    ("fmn", FMN, NORMS, 1.005, 1.03),
    ("fmn-30", lambda t: FMN(t, steps=30), NORMS, 1.01, 1.05),
    ("fab", lambda t: FAB(t, steps=30), NORMS, 1.006, 1.02),  # it ends half a percent behind the boundary: eta, beta
    ("deepfool", DeepFool, ("linf", "l2"), 1.03, 1.05),
    ("cw", lambda t: CW(t, steps=300, search_steps=6), ("l2",), 1.01, 1.05),
]
CASES = [
    pytest.param(make, norm, median, worst, id=f"{name}-{norm}")
    for name, make, norms, median, worst in ATTACKS
    for norm in norms
]


@pytest.mark.parametrize("bounds", BOUNDS, ids=str)
@pytest.mark.parametrize(("make", "norm", "median", "worst"), CASES)
def test_the_minimum_of_a_linear_model_in_the_box_is_found(
    make: Any, norm: str, median: float, worst: float, bounds: Any
) -> None:
    model, batch, direction = corner(bounds)
    needed = (model(batch.x)[:, 1] - model(batch.x)[:, 0]).abs()
    least = shortest(batch.x.flatten(1), direction, needed, norm, bounds)
    x_adv = make(ThreatModel(norm, 0.1, bounds))(model, batch)
    assert (model(x_adv).argmax(dim=1) != batch.y).all()
    assert bounds[0] <= x_adv.min()
    assert x_adv.max() <= bounds[1]
    ratio = ThreatModel(norm, 1.0, bounds).distance(x_adv, batch.x) / least
    assert ratio.min() >= 1 - 1e-5
    assert ratio.median() <= median, ratio.sort().values
    assert ratio.max() <= worst, ratio.sort().values
