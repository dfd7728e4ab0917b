"""Check that an attack keeps its contract."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from contextlib import suppress

import torch
from torch import nn

from unmoved.core.batch import Batch
from unmoved.core.protocols import (
    FIXED_STEP,
    GRADIENTS,
    Attack,
    couples_samples,
    draws_of,
    is_lockstep,
    is_minimum_norm,
    kind_of,
    leaves_ball,
    takes_mixed,
)
from unmoved.core.threat import ThreatModel
from unmoved.testing.fixtures import Failing, Planned, network, require, same_random_state, small_batch, untouched


def check_attack(
    make: Callable[[ThreatModel], Attack],
    *,
    norm: str = "linf",
    maximises: bool | None = None,
    batch_statistics: bool | None = None,
    minimum_norm: bool | None = None,
    reach: float = 0.05,
) -> None:
    """Check that an attack stays in the ball, changes nothing of the caller's, and beats a linear model as it must.

    One that declares that it leaves the ball has to stay in the box, and to climb half as far as the ball allows.

    Args:
        make: threat model -> the attack.
        norm: of the threat model.
        maximises: whether the attack seeks the largest loss; if not (early stopping), no optimum is asked for.
            ``None``: whether it declares that it uses gradients.
        batch_statistics: whether it attacks the model in training mode, so that samples depend on each other by
            design; the laws of order and batch size are then skipped. ``None``: whether its ``mode`` is "train".
        minimum_norm: whether it seeks the nearest misclassified image, inside the ball or not: the optimum is then the
            distance to the boundary rather than the edge of the ball. ``None`` is what the attack declares.
        reach: how far short of the optimum it may fall, as a share.

    Raises:
        ExamFailed: naming the property.
    """
    threat = ThreatModel(norm, 0.08 if norm == "linf" else 0.5)
    attack, model, batch = make(threat), network(), small_batch()
    name = repr(attack)
    draws_of(attack), is_lockstep(attack)  # what it declares wrongly is refused
    maximises = kind_of(attack) in (GRADIENTS, FIXED_STEP) if maximises is None else maximises
    batch_statistics = getattr(attack, "mode", "eval") == "train" if batch_statistics is None else batch_statistics
    minimum_norm = is_minimum_norm(attack) if minimum_norm is None else minimum_norm
    model[1].eval()  # one frozen BatchNorm inside a training model: modes are restored one by one
    next(model.parameters()).grad = torch.ones_like(next(model.parameters()))
    with untouched(model), same_random_state():
        x_adv = attack(model, batch)
    require(not x_adv.requires_grad, f"{name}: the proposal still carries a graph")
    box = dataclasses.replace(threat, eps=1.0 if norm == "linf" else 1e3)
    (box if minimum_norm or leaves_ball(attack) else threat).check(x_adv, batch.x, name)
    fresh = small_batch()
    require(torch.equal(batch.x, fresh.x) and torch.equal(batch.y, fresh.y), f"{name}: changed its input")
    require(torch.equal(x_adv, attack(model, batch)), f"{name}: two calls on the same batch differ")
    for guard in (torch.no_grad, torch.inference_mode):
        with guard():
            require(torch.equal(x_adv, attack(model, batch)), f"{name}: differs inside {guard.__name__}")
    if not minimum_norm:
        still = make(dataclasses.replace(threat, eps=0.0))(model, batch)
        require(torch.equal(still, batch.x), f"{name}: eps = 0 moves x")
    if not batch_statistics:
        _check_batch_laws(attack, model, batch, name)
    _check_failing(attack, model, batch)
    _check_mixed(attack, model, batch, name)
    if leaves_ball(attack):
        _check_climbs(attack, threat, name)
    elif minimum_norm:
        _check_nearest(attack, norm, name, reach)
    elif maximises:
        _check_linear_optimum(attack, threat, name, reach)


def _check_failing(attack: Attack, model: nn.Module, batch: Batch) -> None:
    """Check that nothing of the caller's has changed after a forward pass that raises."""
    for fails_at in (1, 2):
        broken = Failing(model, fails_at)
        with untouched(model), same_random_state(), suppress(Planned):
            attack(broken, batch)


def _check_mixed(attack: Attack, model: nn.Module, batch: Batch, name: str) -> None:
    """Check, where it takes images mixed of two, that a label with no share of the image does not count."""
    if not takes_mixed(attack) or couples_samples(getattr(attack, "loss", None)):
        return
    exact, wide = copy.deepcopy(model).double(), dataclasses.replace(batch, x=batch.x.double())
    first, second = batch.y, (batch.y + 1) % 5
    for share, label in ((1.0, first), (0.0, second)):
        mixed = dataclasses.replace(wide, other=second, share=torch.full(first.shape, share, dtype=torch.float64))
        alone = attack(exact, dataclasses.replace(wide, y=label))
        require(torch.allclose(attack(exact, mixed), alone), f"{name}: a label of no share of the image counts")


def _check_batch_laws(attack: Attack, model: nn.Module, batch: Batch, name: str) -> None:
    """Check, in float64 where rounding decides no sign, that a result depends on its own sample alone."""
    exact, wide = copy.deepcopy(model).double(), dataclasses.replace(batch, x=batch.x.double())
    together = attack(exact, wide)
    order = torch.arange(len(wide) - 1, -1, -1)
    require(torch.allclose(attack(exact, wide.take(order)), together[order]), f"{name}: depends on the batch's order")
    alone = torch.cat([attack(exact, wide.take(torch.tensor([k]))) for k in range(len(wide))])
    require(torch.allclose(alone, together), f"{name}: depends on the other samples of the batch")


def _linear() -> tuple[nn.Module, torch.Tensor, Batch]:
    """Make two linear logits with score ``w x``, and images far from the edges of the box: only the ball binds."""
    draw = torch.Generator().manual_seed(3)
    weight = torch.randn(16, generator=draw, dtype=torch.float64)
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 2, bias=False)).double()
    with torch.no_grad():
        next(model.parameters()).copy_(torch.stack([-weight, weight]) / 2)
    x = 0.5 + 0.02 * torch.randn(64, 1, 4, 4, generator=draw, dtype=torch.float64)
    return model, weight, Batch(x, (x.flatten(1) @ weight > 0).long())


def _dual(weight: torch.Tensor, norm: str) -> float:
    return float(torch.linalg.vector_norm(weight, ord={"linf": 1, "l2": 2, "l1": float("inf")}[norm]))


def _check_nearest(attack: Attack, norm: str, name: str, short: float) -> None:
    """Compare with the distance of a linear model's boundary, ``margin / ||w||_dual``."""
    model, weight, batch = _linear()
    x_adv = attack(model, batch)
    nearest = (batch.x.flatten(1) @ weight).abs() / _dual(weight, norm)
    distance = ThreatModel(norm, 1.0).distance(x_adv, batch.x)
    require(bool((model(x_adv).argmax(dim=1) != batch.y).all()), f"{name}: not misclassified on the linear model")
    require((distance >= nearest - 1e-9).all(), f"{name}: nearer than the boundary of the linear model")
    worst = float((distance / nearest).max()) - 1
    require(worst <= short, f"{name}: {worst:.0%} farther than the boundary of the linear model ({short:.0%} allowed)")


def _check_climbs(attack: Attack, threat: ThreatModel, name: str) -> None:
    """Check that on average the margin of two linear logits falls by half of ``eps ||w||_dual``, or by more."""
    model, weight, batch = _linear()
    fall = ((batch.x - attack(model, batch)).flatten(1) @ weight) * (2 * batch.y - 1)
    half = threat.radius * _dual(weight, threat.norm) / 2
    require(float(fall.mean()) >= half, f"{name}: does not climb on the linear model")


def _check_linear_optimum(attack: Attack, threat: ThreatModel, name: str, short: float) -> None:
    """Compare with the smallest margin of two linear logits, ``margin - eps ||w||_dual`` (Goodfellow et al. 2015)."""
    model, weight, batch = _linear()
    score, y = batch.x.flatten(1) @ weight, batch.y
    reach = threat.radius * _dual(weight, threat.norm)
    after = (attack(model, batch).flatten(1) @ weight) * (2 * y - 1)
    best = score.abs() - reach
    # Madry's rule walks 2.5 eps in all, which from a random start leaves an l2 attack 2-3 % short of the best.
    gap = float((after - best).max())
    require((after >= best - 1e-9).all(), f"{name}: better than the optimum on the linear model: it left the ball")
    require(
        gap <= short * reach, f"{name}: {gap / reach:.0%} short of the linear model's optimum ({short:.0%} allowed)"
    )
