"""What the cheap ensemble spends on whom."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from unmoved.attacks.boundary_distance import DistanceEstimator
from unmoved.attacks.ensembles import AutoAttack, Near, Quick
from unmoved.core.batch import Batch
from unmoved.core.threat import ThreatModel

LINF = ThreatModel("linf", 0.1)
DISTANCES = torch.tensor([0.05, 0.105, 0.12, 0.2, 0.5])


class Steps(nn.Module):
    """The second class wins from a brightness of the first pixel on that is 0.5."""

    def forward(self, x: Tensor) -> Tensor:
        rise = x.flatten(1)[:, 0] - 0.5
        return torch.stack([-rise, rise], 1)


def batch() -> Batch:
    """Images at these distances of the boundary."""
    x = torch.full((5, 1, 2, 2), 0.3)
    x[:, 0, 0, 0] = 0.5 - DISTANCES
    return Batch(x, torch.zeros(5, dtype=torch.int64), torch.arange(10, 15))


def beyond(model: nn.Module, some: Batch) -> Tensor:
    """Search a little beyond the boundary, and for the sample 13 not far enough."""
    x = some.x.clone()
    x[:, 0, 0, 0] = torch.where(some.index == 13, x[:, 0, 0, 0] + 0.11, 0.5001)
    return x


class Records:
    """An attack that breaks nobody, or all within the ball of this size, and says whom it was asked about."""

    def __init__(self, size: float = 0.0) -> None:
        self.size = size
        self.asked: list[int] = []

    def __call__(self, model: nn.Module, some: Batch) -> Tensor:
        self.asked += some.index.tolist()
        return some.x + self.size


def test_attacks_get_the_samples_that_are_near_enough_and_not_broken_yet() -> None:
    wide, narrow, strong = Records(), Records(), Records(0.1)
    last = Records()
    x_adv = Near(DistanceEstimator(LINF, beyond), ((6.0, wide), (1.3, narrow), (1.1, strong), (6.0, last)))(
        Steps(), batch()
    )
    assert wide.asked == [11, 12, 14], "10 is broken by the search, for 13 it found nothing"
    assert narrow.asked == [11, 12]
    assert strong.asked == [11]
    assert last.asked == [11, 12, 14], "strong proposed what is no success"
    assert torch.equal(x_adv[1:], batch().x[1:])
    assert LINF.distance(x_adv, batch().x)[0] > 0.05


def test_a_sample_that_is_broken_is_left_and_a_success_outside_the_ball_is_none() -> None:
    threat = ThreatModel("linf", 0.11)
    inside, outside, last = Records(0.11), Records(0.13), Records()
    x_adv = Near(DistanceEstimator(threat, beyond), ((1.3, outside), (1.3, inside), (9.0, last)))(Steps(), batch())
    assert outside.asked == [12], "11 is within the ball"
    assert inside.asked == [12]
    assert last.asked == [12, 14]
    threat.check(x_adv, batch().x)
    assert (Steps()(x_adv).argmax(1) == 1).tolist() == [True, True, False, False, False]


def test_who_is_broken_is_asked_about_no_more() -> None:
    """The search changes other pixels too, so that 11, whose boundary is in the ball, is left to the attacks."""
    threat = ThreatModel("linf", 0.11)

    def astray(model: nn.Module, some: Batch) -> Tensor:
        x = some.x + 0.2
        x[:, 0, 0, 0] = 0.5001
        return x

    first, last = Records(0.11), Records()
    x_adv = Near(DistanceEstimator(threat, astray), ((2, first), (2, last)))(Steps(), batch())
    assert first.asked == [10, 11, 12, 13]
    assert last.asked == [12, 13]
    assert (Steps()(x_adv).argmax(1) == 1).tolist() == [True, True, False, False, False]


def test_the_seed_of_an_ensemble_is_that_of_its_parts() -> None:
    for norm in ("linf", "l1"):
        for version in ("standard", "rand"):
            whole = AutoAttack(ThreatModel(norm, 0.1), version=version, seed=7)
            for classes in (2, 3, 10):
                assert {part.seed for part in whole.parts(classes).values()} == {7}  # type: ignore[attr-defined]

    def seeds(seed: int) -> list[int]:
        first, near = Quick(LINF, seed=seed).parts(10).values()
        return [first.seed, *(attack.seed for _, attack in near.attacks)]  # type: ignore[attr-defined]

    assert seeds(7) == [seed + 7 for seed in seeds(0)]


def test_who_is_near_does_not_hang_on_the_company() -> None:
    whole = Near(DistanceEstimator(LINF, beyond), ((1.3, Records(0.1)),))(Steps(), batch())
    for k in range(5):
        alone = Near(DistanceEstimator(LINF, beyond), ((1.3, Records(0.1)),))(Steps(), batch().take(torch.tensor([k])))
        assert torch.equal(alone[0], whole[k])
