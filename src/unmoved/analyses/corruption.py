"""Measure how much a risk changes when the weights are corrupted: APD's loss-change indicators of flatness.

``DL(a) = L(w + a) - L(w)``; the average over random corruptions of size eps, ``I_ave``, and the largest that a gradient
attack finds, ``I_max``. Zhang et al. 2021 (arXiv 2109.02889), Sun et al. 2021 (AAAI); the names and the exact form of
I_ave are from memory of the paper.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd
import torch
from scipy.special import beta
from torch import Tensor

from unmoved.analyses.risks import Point, Risk
from unmoved.core import noise, weights
from unmoved.core.errors import UnmovedError, require_choice, require_number, require_whole

RANDOM, ADVERSARIAL = "random", "adversarial"
STEPS, DRAWS = 10, 20
COLUMNS = ["kind", "scope", "p", "n", "k", "eps", "eps_relative", "draw", "steps", "loss", "accuracy", "loss_change"]
COLUMNS += ["accuracy_change", "clean_loss", "clean_accuracy", "linear_change", "first_order", "images"]


@dataclass(frozen=True)
class Worst:
    """Hold I_max, the largest DL on the path of the attack, the corruption that does it, and DL after each step."""

    value: float
    corruption: list[Tensor]
    path: tuple[float, ...]


def direction(risk: Risk, draw: int, *, p: float = 2, n: int | None = None, seed: int = 0) -> list[Tensor]:
    """Draw random corruption number ``draw`` with ``||r||_p = 1``, in the form of the risk's parameters.

    p = 2: uniform on the sphere, ``z / ||z||_2`` with z normal. p = inf: independent random signs, the corners of the
    cube rather than all of its surface, so that every coordinate moves by eps as in the attack; our own choice. With
    n: n coordinates at random, the rest zero; the second moment of a coordinate stays ``1/k`` (p = 2), is ``n/k``
    (p = inf). A function of (seed, scope, draw) alone: the same for every eps and for models of the same shape.

    Raises:
        UnmovedError: p other than 2 or inf, n outside 1..k, or a negative draw.
    """
    require_choice("p", p, (2, math.inf))
    draw = require_whole("draw", draw, at_least=0)
    first = risk.parameters[0]
    k = sum(t.numel() for t in risk.parameters)
    index = torch.tensor([draw], device="cpu" if first.device.type == "mps" else first.device)  # no float64 there
    streams = [4 * zlib.crc32(risk.scope.encode()) + use for use in range(2)]
    count = k if n is None else _require_sparsity(n, k)
    values = noise.normal(index, (count,), seed=seed, stream=streams[0])[0].double()
    values = values.sign() if p == math.inf else values / torch.linalg.vector_norm(values)
    if n is not None:
        where = noise.uniform(index, (k,), seed=seed, stream=streams[1])[0].topk(count).indices
        values = torch.zeros(k, dtype=values.dtype, device=values.device).index_copy(0, where, values)
    parts = torch.split(values.to(first.dtype).to(first.device), [t.numel() for t in risk.parameters])
    return [part.reshape(t.shape).to(t.dtype) for part, t in zip(parts, risk.parameters, strict=True)]


def worst_change(
    risk: Risk,
    eps: float,
    *,
    p: float = 2,
    n: int | None = None,
    steps: int = STEPS,
    step_size: float | None = None,
    seed: int = 0,
) -> Worst:
    """Find ``I_max``, the largest ``L(w + a) - L(w)`` with ``||a||_p <= eps`` and at most n entries, by an attack.

    ``a_0 = 0``, ``a_t = project(a_{t-1} + steepest(grad L(w + a_{t-1}), alpha))``; the largest over t = 0..steps, so
    never negative, and a lower bound of the true maximum. Where the gradient at w is exactly zero, the first step goes
    along `direction` 0. steps gradients and one pass.

    Args:
        step_size: alpha; None is ``1.5 eps / steps``.

    Raises:
        UnmovedError: as `direction` and the risk; a negative eps or step_size; fewer than one step.

    Deviations: the group's code takes a dense step for p = 2 and then keeps the n largest entries, which loses nearly
    all of the step's length where n is small; ours is the steepest step of n entries. The gradient is that of all
    images, not of a new mini-batch each step.
    """
    eps = require_number("eps", eps, at_least=0)
    with risk.held():
        return _climb(risk, risk.at(gradient=True), eps, p, n, steps, step_size, seed)[0]


def expected_ratio(k: int) -> float:
    """Return ``E|r.g| / (eps ||g||_2) = Gamma(k/2) / (sqrt(pi) Gamma((k+1)/2)) ~ sqrt(2/(pi k))`` on the sphere in R^k.

    To first order, what share of the worst effect a random corruption has (p = 2, all coordinates).

    Raises:
        UnmovedError: k < 1.
    """
    k = require_whole("expected_ratio: k", k, at_least=1)
    return float(beta(0.5, k / 2)) / math.pi  # the same in one function that does not overflow


def sweep(
    risk: Risk,
    eps: Sequence[float],
    *,
    relative: bool = True,
    p: float = 2,
    n: int | None = None,
    draws: int = DRAWS,
    steps: int = STEPS,
    seed: int = 0,
) -> pd.DataFrame:
    """Measure random and adversarial corruptions over a grid of eps; one observation a row.

    The random directions are shared between all eps (and by models of the same shape), so differences along the grid
    are not noise of the draws. One pass gives loss and accuracy; the pass and gradient at w serve the whole grid:
    ``1 + len(eps) (draws + steps)`` passes, of which ``1 + len(eps) (steps - 1)`` with a gradient. The adversarial
    row is the point of the highest loss, not of the lowest accuracy. Changes near 1e-6 of the loss are rounding.

    Args:
        eps: radii above 0.
        relative: eps in units of ``||w||_2`` of the scope (a layer's own norm), whatever p.
        draws, steps: 0 leaves out the random or the adversarial rows.

    Returns:
        kind ("random", "adversarial"), scope, p, n (NaN: all), k, eps, eps_relative, draw (NaN if adversarial), steps
        (0 if random), loss, accuracy, loss_change, accuracy_change, clean_loss, clean_accuracy, linear_change (``r.g``
        with g the gradient at w), first_order (``|r.g|`` over the worst first-order effect of the same p, n and eps),
        both NaN if adversarial, images.

    Raises:
        UnmovedError: an empty grid or an eps that is not above 0; ``relative`` with weights that are all zero;
            otherwise as `direction` and `worst_change`.
    """
    if not len(eps):
        raise UnmovedError("sweep: expected at least one eps, came none")
    for value in eps:
        require_number("sweep: eps", value, above=0)
    require_choice("p", p, (2, math.inf))
    draws = require_whole("draws", draws, at_least=0)
    steps = require_whole("steps", steps, at_least=0)
    size = float(torch.linalg.vector_norm(torch.stack([t.detach().double().norm() for t in risk.parameters])))
    if relative and size == 0:
        raise UnmovedError(f"sweep: expected weights of some size in {risk.scope!r}, came zeros; use relative=False")
    radii = [float(value) * (size if relative else 1.0) for value in eps]
    with risk.held():
        clean = risk.at(gradient=True)
        observations = _observations(risk, clean, radii, p, n, draws, steps, seed)
        top = _dot(clean.gradient, weights.steepest(clean.gradient, 1.0, p, n))
    return _table(risk, clean, observations, size, top).assign(p=float(p), n=math.nan if n is None else float(n))[
        COLUMNS
    ]


@dataclass(frozen=True)
class _Observation:
    """Hold what one corruption did: ``rise`` is the first-order change of the loss for each unit of eps."""

    kind: str
    eps: float
    draw: float
    steps: int
    point: Point
    rise: float


def _observations(
    risk: Risk, clean: Point, radii: Sequence[float], p: float, n: int | None, draws: int, steps: int, seed: int
) -> list[_Observation]:
    """Measure the random corruptions, each direction at all radii, and the adversarial one at each radius."""
    observations: list[_Observation] = []
    for draw in range(draws):
        unit = direction(risk, draw, p=p, n=n, seed=seed)
        rise = _dot(clean.gradient, unit)
        observations += [_Observation(RANDOM, r, draw, 0, _moved(risk, _scaled(unit, r)), rise) for r in radii]
    for r in radii if steps else []:
        best = _climb(risk, clean, r, p, n, steps, None, seed)[1]
        observations.append(_Observation(ADVERSARIAL, r, math.nan, steps, best, math.nan))
    return observations


def _table(risk: Risk, clean: Point, observations: Sequence[_Observation], size: float, top: float) -> pd.DataFrame:
    """Tabulate one row an observation; ``size`` is the norm of the weights, ``top`` the largest ``rise`` there is."""
    table = pd.DataFrame(
        [
            {
                "kind": one.kind,
                "scope": risk.scope,
                "k": sum(t.numel() for t in risk.parameters),
                "eps": one.eps,
                "eps_relative": one.eps / size if size else math.nan,
                "draw": float(one.draw),
                "steps": one.steps,
                "loss": one.point.loss,
                "accuracy": one.point.accuracy,
                "loss_change": one.point.loss - clean.loss,
                "accuracy_change": one.point.accuracy - clean.accuracy,
                "clean_loss": clean.loss,
                "clean_accuracy": clean.accuracy,
                "linear_change": one.eps * one.rise,
                "first_order": abs(one.rise) / top if top > 0 else math.nan,
                "images": risk.images,
            }
            for one in observations
        ],
        columns=[name for name in COLUMNS if name not in ("p", "n")],
    )
    return table.sort_values(["eps", "kind", "draw"], kind="stable", ignore_index=True)


def _climb(
    risk: Risk,
    clean: Point,
    eps: float,
    p: float,
    n: int | None,
    steps: int,
    step_size: float | None,
    seed: int,
) -> tuple[Worst, Point]:
    """Attack from a point whose gradient is known; return also the best point of the path."""
    steps = require_whole("steps", steps, at_least=1)
    alpha = 1.5 * eps / steps if step_size is None else step_size
    alpha = require_number("step_size", alpha, at_least=0)
    corruption = [torch.zeros_like(t) for t in risk.parameters]
    gradient, best, worst, path = clean.gradient, clean, corruption, []
    if not any(g.any() for g in gradient):
        gradient = direction(risk, 0, p=p, n=n, seed=seed)
    for step in range(1, steps + 1):
        ascent = weights.steepest(gradient, alpha, p, n)
        corruption = weights.project([a + d for a, d in zip(corruption, ascent, strict=True)], eps, p, n)
        point = _moved(risk, corruption, gradient=step < steps)
        path.append(point.loss - clean.loss)
        if point.loss > best.loss:
            best, worst = point, corruption
        gradient = point.gradient
    return Worst(best.loss - clean.loss, worst, tuple(path)), best


def _moved(risk: Risk, corruption: Sequence[Tensor], gradient: bool = False) -> Point:
    with weights.perturbed(risk.parameters, corruption):
        return risk.at(gradient)


def _scaled(unit: Sequence[Tensor], eps: float) -> list[Tensor]:
    return [eps * part for part in unit]


def _dot(one: Sequence[Tensor], other: Sequence[Tensor]) -> float:
    return math.fsum(float((a.double() * b.double()).sum()) for a, b in zip(one, other, strict=True))


def _require_sparsity(n: int, k: int) -> int:
    n = require_whole("n", n, at_least=1, at_most=k, advice="it counts corrupted weights")
    return int(n)
