"""Schedules against torch's own, and against what the optimizer was asked for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import OneCycleLR

from unmoved.training.optim import SGD, Adam, OneCycle


def parameters() -> list[dict[str, Any]]:
    return [{"params": [nn.Parameter(torch.zeros(1))]}]


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (SGD(0.3, 0.5, 0.01, True), lambda p: torch.optim.SGD(p, 0.3, 0.5, weight_decay=0.01, nesterov=True)),
        (SGD(0.3, 0.0, 0.02), lambda p: torch.optim.SGD(p, 0.3, weight_decay=0.02)),
        (Adam(0.3, 0.01), lambda p: torch.optim.Adam(p, 0.3, weight_decay=0.01)),
        (Adam(0.3, 0.01, decoupled=True), lambda p: torch.optim.AdamW(p, 0.3, weight_decay=0.01)),
    ],
    ids=["nesterov", "no momentum", "adam", "adamw"],
)
def test_optimizers_are_torchs(ours: SGD | Adam, theirs: Any) -> None:
    """The same bits after three steps from the same weights."""
    ends = []
    for make in (ours, theirs):
        weight = nn.Parameter(torch.tensor([1.0, -2.0]))
        optimizer = make([{"params": [weight]}])
        for step in range(3):
            weight.grad = torch.tensor([0.5, step - 1.0])
            optimizer.step()
        ends.append(weight.detach())
    assert torch.equal(*ends)


def rates(schedule: Any, steps: int) -> list[float]:
    used = []
    for _ in range(steps):
        used.append(schedule.optimizer.param_groups[0]["lr"])
        schedule.optimizer.step()
        schedule.step()
    return used


@pytest.mark.parametrize("asked", [SGD(momentum=0.0), SGD(momentum=0.9, nesterov=True), Adam(), Adam(decoupled=True)])
def test_one_cycle_leaves_the_momentum_that_was_asked_for(asked: SGD | Adam) -> None:
    optimizer = asked(parameters())
    before = {key: value for key, value in optimizer.param_groups[0].items() if key in ("momentum", "betas")}
    schedule = OneCycle()(optimizer, 10, 5)
    for _ in range(10):
        assert {key: optimizer.param_groups[0][key] for key in before} == before
        rates(schedule, 1)


def test_one_cycle_cycles_momentum_where_it_is_told_to() -> None:
    ours, theirs = (SGD(momentum=0.0)(parameters()) for _ in range(2))
    schedules = OneCycle(cycle_momentum=True)(ours, 10, 5), OneCycleLR(theirs, 0.1, total_steps=11)
    for _ in range(10):
        assert ours.param_groups[0]["momentum"] == theirs.param_groups[0]["momentum"] > 0.8
        for schedule in schedules:
            rates(schedule, 1)


@pytest.mark.parametrize(("warmup", "steps"), [(0.3, 10), (0.05, 40), (0.9, 3), (0.5, 2)])
def test_one_cycle_gives_the_rates_of_torch(warmup: float, steps: int) -> None:
    reference = OneCycleLR(SGD()(parameters()), 0.1, total_steps=steps + 1, pct_start=warmup)
    assert rates(OneCycle(warmup)(SGD()(parameters()), steps, steps), steps) == rates(reference, steps)


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 9, 19, 48, 99])
def test_a_rise_of_no_steps_starts_at_the_peak(steps: int) -> None:
    """``warmup * (steps + 1) = 1``: torch divides by zero there. A shorter rise, also of no step, starts so too."""
    used = rates(OneCycle(1 / (steps + 1))(SGD(lr=0.1)(parameters()), steps, steps), steps)
    shorter = OneCycleLR(SGD(lr=0.1)(parameters()), 0.1, total_steps=steps + 1, pct_start=1 / (steps + 1) - 1e-7)
    assert used == pytest.approx(rates(shorter, steps), rel=1e-5)
    assert used[0] == pytest.approx(0.1)
