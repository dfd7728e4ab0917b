"""PGD from output-diversified starts, against corners and boundaries of linear models."""

from __future__ import annotations

import pytest
import torch
from helpers.linear_models import linear, nearest, with_weights

from unmoved.attacks import odi
from unmoved.attacks.apgd_steps import with_momentum
from unmoved.attacks.odi import DiversifiedPGD
from unmoved.attacks.rounds import Round
from unmoved.core.batch import Batch
from unmoved.core.threat import ThreatModel
from unmoved.core.views import Views
from unmoved.terms import Margin, TargetedMargin
from unmoved.testing import check_attack


def starts(seed: int, restart: int = 0, order: list[int] | None = None, eps: float = 0.1) -> torch.Tensor:
    """Where 64 samples of two opposite logits start, in units of eps: (64, 16)."""
    slope = torch.linspace(-1, 1, 16, dtype=torch.float64) + 0.01
    model = with_weights(torch.stack([slope, -slope]), torch.zeros(2, dtype=torch.float64))
    order = order or list(range(64))
    batch = Batch(torch.full((64, 1, 4, 4), 0.5, dtype=torch.float64), torch.ones(64).long(), torch.tensor(order))
    attack = DiversifiedPGD(ThreatModel("linf", eps), seed=seed)
    start = attack._start_of(Views(model, batch))(batch, Round(restart))
    return (start - batch.x).flatten(1) / eps * slope.sign()


def test_a_start_is_the_corner_where_a_random_combination_of_linear_outputs_is_largest() -> None:
    corners = starts(seed=0)
    assert torch.allclose(corners.abs(), torch.ones_like(corners))
    assert torch.equal(corners, corners[:, :1].expand_as(corners)), "all pixels go one way along the slope"
    assert 16 < (corners[:, 0] > 0).sum() < 48, "and half of the samples each way"


def test_starts_hang_on_seed_restart_and_identity_and_on_nothing_else() -> None:
    first = starts(seed=0)
    shuffled = torch.randperm(64, generator=torch.Generator().manual_seed(0))
    assert torch.equal(starts(seed=0, order=shuffled.tolist()), first[shuffled])
    for other in (starts(seed=1), starts(seed=0, restart=1)):
        assert 0.2 < (other != first).any(1).float().mean() < 0.8


def test_without_steps_of_its_own_a_start_is_the_clean_image() -> None:
    model, batch = linear(3)
    for restart in (0, 1):
        start = DiversifiedPGD(ThreatModel("linf", 0.1), start_steps=0)._start_of(Views(model, batch))
        assert torch.equal(start(batch, Round(restart)), batch.x)


def test_outputs_are_weighted_from_minus_one_to_one() -> None:
    """The weighted output of the logits e_k is the weight of class k itself."""
    count = 500
    batch = Batch(torch.zeros(count, 1, 1, 1), torch.zeros(count).long(), torch.arange(count))
    outputs = odi._WeightedOutputs(batch, seed=0, stream=0)
    weights = torch.stack(
        [outputs(Views(torch.nn.Identity(), batch).at(batch.x, torch.eye(4)[k].expand(count, 4))) for k in range(4)]
    )
    assert weights.abs().max() <= 1
    assert abs(weights.mean()) < 4.5 / (12**0.5 / 2) / (4 * count) ** 0.5
    assert (weights < -0.9).any()
    assert (weights > 0.9).any()


def test_steps_fall_along_half_a_cosine(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[float] = []

    def noted(threat, x, x_adv, x_old, gradient, size, step):  # type: ignore[no-untyped-def]
        sizes.append(size)
        return with_momentum(threat, x, x_adv, x_old, gradient, size, step)

    monkeypatch.setattr(odi, "with_momentum", noted)
    model, batch = linear(2)
    DiversifiedPGD(ThreatModel("linf", 1e-4), steps=4)(model, batch)
    assert sizes[:4] == pytest.approx([2e-4, 1e-4 * (1 + 0.5**0.5), 1e-4, 1e-4 * (1 - 0.5**0.5)])


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
@pytest.mark.parametrize("targets", [0, 4])
def test_of_a_linear_model_it_breaks_what_is_nearer_than_eps(norm: str, targets: int) -> None:
    """Untargeted of two classes alone: the largest of several margins has local maxima, even here."""
    model, batch = linear(5 if targets else 2)
    distance = nearest(model, batch, norm)
    eps = float(distance.median()) * 1.001
    loss = TargetedMargin() if targets else Margin()
    threat = ThreatModel(norm, eps)
    x_adv = DiversifiedPGD(threat, loss, steps=40, targets=targets)(model, batch)
    threat.check(x_adv, batch.x)
    broken = model(x_adv).argmax(1) != batch.y
    assert not broken[distance > eps * 1.0001].any()
    assert broken[distance < 0.98 * eps].all()


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_it_sits_the_exam(norm: str) -> None:
    check_attack(lambda t: DiversifiedPGD(t, TargetedMargin(), steps=10, targets=3, restarts=2), norm=norm)
