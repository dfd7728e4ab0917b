"""Where the boundary is believed to be."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from unmoved.attacks.boundary_distance import DistanceEstimator
from unmoved.core.batch import Batch
from unmoved.core.threat import ThreatModel

DISTANCES = torch.tensor([0.05, 0.1, 0.12, 0.3])


class Linear(nn.Module):
    """The first class wins by twice the mean brightness that is lacking to 0.5."""

    def forward(self, x: Tensor) -> Tensor:
        rise = x.flatten(1).mean(1) - 0.5
        return torch.stack([-rise, rise], 1)


class Cliff(Linear):
    """The same decisions; the margin hardly falls before the boundary."""

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = super().forward(x)
        return torch.where(logits > 0, 1 + 0.01 * logits, logits)


def batch() -> Batch:
    """Images of one brightness each, at these distances of the boundary by linf."""
    x = (0.5 - DISTANCES).view(-1, 1, 1, 1).expand(-1, 1, 2, 2).clone()
    return Batch(x, torch.zeros(4, dtype=torch.int64), torch.arange(4))


def brighter(model: nn.Module, some: Batch) -> Tensor:
    return torch.full_like(some.x, 0.55)


@pytest.mark.parametrize(("norm", "unit"), [("linf", 1.0), ("l2", 2.0), ("l1", 4.0)])
def test_a_linear_margin_tells_the_distance_exactly(norm: str, unit: float) -> None:
    """Four pixels at distance d have the norms d, 2 d and 4 d."""
    threat = ThreatModel(norm, 0.1 * unit)
    distance, in_ball = DistanceEstimator(threat, brighter)(Linear(), batch())
    torch.testing.assert_close(distance, DISTANCES / 0.1, atol=1e-4, rtol=0)
    threat.check(in_ball, batch().x)
    torch.testing.assert_close(threat.distance(in_ball, batch().x).float(), torch.full((4,), 0.1 * unit))


def test_the_margin_counts_and_not_how_long_the_way_is() -> None:
    """A margin that has fallen by a hundredth of itself in the ball would take a hundred times as far."""
    distance, _ = DistanceEstimator(ThreatModel("linf", 0.1), brighter)(Cliff(), batch())
    assert distance[0] < 1, "broken on the way"
    assert (distance[2:] > 10).all()


def test_no_boundary_is_believed_in_where_none_was_found_or_nothing_falls() -> None:
    def darker(model: nn.Module, some: Batch) -> Tensor:
        return some.x - 0.1

    def stays(model: nn.Module, some: Batch) -> Tensor:
        return some.x.clone()

    for search in (darker, stays):
        distance, in_ball = DistanceEstimator(ThreatModel("linf", 0.1), search)(Linear(), batch())
        assert torch.isinf(distance).all()
        assert torch.isfinite(in_ball).all()


def test_a_search_that_ends_short_of_the_boundary_is_not_believed() -> None:
    """The margin falls on the way, but who says that it goes on?"""

    def short(model: nn.Module, some: Batch) -> Tensor:
        return some.x + 0.04

    assert torch.isinf(DistanceEstimator(ThreatModel("linf", 0.1), short)(Linear(), batch()).distance).all()


def test_an_image_found_inside_the_ball_is_the_surface() -> None:
    distance, in_ball = DistanceEstimator(ThreatModel("linf", 0.5), brighter)(Linear(), batch())
    torch.testing.assert_close(in_ball, torch.full_like(in_ball, 0.55))
    assert (distance <= 1).all()
