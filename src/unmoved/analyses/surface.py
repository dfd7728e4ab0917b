"""Compute the risk around the weights, along the worst direction that an attack found and along a random one."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pandas as pd
import torch
from torch import Tensor

from unmoved.analyses.corruption import direction, worst_change
from unmoved.analyses.risks import Point, Risk
from unmoved.core.errors import UnmovedError, require_number, require_whole
from unmoved.core.weights import perturbed

WORST, RANDOM = "worst", "random"
Direction = Sequence[Tensor]


def worst_and_random(
    risk: Risk, eps: float, *, steps: int = 10, draw: int = 0, seed: int = 0
) -> tuple[list[Tensor], list[Tensor]]:
    """Find two orthogonal directions of l2 norm 1: the corruption that `worst_change` finds at eps, and a random one.

    ``v <- v - (u.v) u``, then ``v / ||v||``. Where no step of the attack raised the risk, u is its gradient.

    Raises:
        UnmovedError: an eps of 0; fewer than two parameters; a risk without a gradient there; as `worst_change`.
    """
    eps = require_number("eps", eps, above=0)
    if sum(t.numel() for t in risk.parameters) < 2:
        raise UnmovedError("surface: expected at least two parameters for two directions, came one")
    worst = worst_change(risk, eps, steps=steps, seed=seed).corruption
    if not any(part.any() for part in worst):
        with risk.held():
            worst = risk.at(gradient=True).gradient
        if not any(part.any() for part in worst):
            raise UnmovedError("surface: expected a direction in which the risk rises, came none; use a larger eps")
    u = _unit([part.double() for part in worst])
    v = [part.double() for part in direction(risk, draw, seed=seed)]
    for _ in range(2):  # once more for what rounding left
        along = sum(float((a * b).sum()) for a, b in zip(u, v, strict=True))
        v = _unit([b - along * a for a, b in zip(u, v, strict=True)])
    first, second = ([part.to(t.dtype) for part, t in zip(parts, risk.parameters, strict=True)] for parts in (u, v))
    return first, second


def plane(
    risk: Risk, eps: float, *, points: int = 15, reach: float = 1.0, steps: int = 10, draw: int = 0, seed: int = 0
) -> pd.DataFrame:
    """Compute the risk on a square around w, ``L(w + a eps u + b eps v)``, u the worst direction and v a random one.

    u and v are orthogonal and of length 1, so distances in the picture are distances of weights; ``points^2`` passes.

    Args:
        eps: radius at which the worst direction is sought (p = 2), and the unit of a and b.
        points: on each side, an odd number, so that w is one of them.
        reach: a and b are in [-reach, reach].

    Returns:
        a (along the worst direction), b (along the random one), eps, loss, accuracy, scope, images.

    Raises:
        UnmovedError: as `worst_and_random`; points that are no odd number above 1, or a reach of 0.
    """
    grid = _grid(points, reach)
    u, v = worst_and_random(risk, eps, steps=steps, draw=draw, seed=seed)
    with risk.held():
        points_of_grid = [(a, b, _along(risk, [u, v], [a * eps, b * eps])) for a in grid for b in grid]
    rows = [(a, b, float(eps), point.loss, point.accuracy, risk.scope, risk.images) for a, b, point in points_of_grid]
    return pd.DataFrame(rows, columns=["a", "b", "eps", "loss", "accuracy", "scope", "images"])


def axes(plane: pd.DataFrame) -> pd.DataFrame:
    """Return the two lines that lie in a `plane`, ``L(w + a eps u)``: direction ("worst", "random"), a, eps, loss..."""
    worst, random = plane[plane["b"] == 0], plane[plane["a"] == 0]
    lines = pd.concat([worst.assign(direction=WORST), random.assign(direction=RANDOM, a=random["b"])])
    return lines.drop(columns="b").reset_index(drop=True)


def _along(risk: Risk, directions: Sequence[Direction], lengths: Sequence[float]) -> Point:
    corruption = [
        sum((length * part for length, part in zip(lengths, parts, strict=True)), torch.zeros_like(parts[0]))
        for parts in zip(*directions, strict=True)
    ]
    with perturbed(risk.parameters, corruption):
        return risk.at()


def _grid(points: int, reach: float) -> list[float]:
    reach = require_number("reach", reach, above=0)
    points = require_whole("points", points, at_least=3)
    if points % 2 == 0:
        raise UnmovedError(f"points: expected an odd number, so that the weights themselves are one, came {points}")
    half = points // 2
    return [reach * k / half for k in range(-half, half + 1)]


def _unit(parts: Sequence[Tensor]) -> list[Tensor]:
    length = math.sqrt(math.fsum(float((part * part).sum()) for part in parts))
    return [part / length for part in parts]
