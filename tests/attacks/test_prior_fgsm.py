"""FGSM-PGI: each step by hand, where the next one starts, and a memory that survives a kill in a training."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers.cli import RECIPE, recipe
from torch import nn

from unmoved.attacks import PriorFGSM
from unmoved.core.batch import Batch
from unmoved.core.errors import UnmovedError
from unmoved.core.protocols import StatefulAttack
from unmoved.core.threat import ThreatModel
from unmoved.runs.recipe import read
from unmoved.runs.train import train_recipe

EPS = 0.0625  # so that multiples of it are exact
THREAT = ThreatModel("linf", EPS)


def stepped(model: nn.Module, x: torch.Tensor, y: torch.Tensor, delta: torch.Tensor) -> torch.Tensor:
    """A step of the paper, clipped to the ball and to valid images."""
    start = (x + delta).clamp(0, 1).requires_grad_()
    nn.functional.cross_entropy(model(start), y, reduction="sum").backward()
    delta = (start.detach() - x + EPS * start.grad.sign()).clamp(-EPS, EPS)
    return (x + delta).clamp(0, 1) - x


def test_each_epoch_starts_where_the_last_one_ended(trained: tuple[nn.Module, Batch]) -> None:
    model, batch = trained
    attack = PriorFGSM(THREAT, seed=2)
    assert isinstance(attack, StatefulAttack)
    delta = attack.start(batch) - batch.x
    inside = (batch.x > EPS) & (batch.x < 1 - EPS)
    assert torch.allclose(delta[inside].abs(), torch.tensor(EPS), atol=1e-6)
    assert abs(delta[inside].sign().mean()) < 0.02
    for step in range(4):
        now = replace(batch, step=step)  # of another step: the start is not drawn again
        x_adv = attack(model, now)
        assert torch.equal(attack(model, now), x_adv), "calling does not write"
        delta = stepped(model, batch.x, batch.y, delta)
        assert torch.allclose(x_adv - batch.x, delta, atol=1e-4)
        attack.update(model, now, x_adv)
        assert torch.allclose(attack.start(now) - batch.x, delta, atol=1e-4)
        delta = attack.start(now) - batch.x


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_first_starts_are_drawn_by_the_seed(trained: tuple[nn.Module, Batch], norm: str) -> None:
    _, batch = trained
    threat = ThreatModel(norm, EPS)
    first, again, other = (PriorFGSM(threat, seed=seed).start(batch) for seed in (2, 2, 3))
    assert torch.equal(first, again)
    assert (first != other).float().mean() > 0.2
    threat.check(first, batch.x)


def test_memory_belongs_to_the_sample_and_survives(trained: tuple[nn.Module, Batch]) -> None:
    model, batch = trained
    whole, halves, fresh = PriorFGSM(THREAT), PriorFGSM(THREAT), PriorFGSM(THREAT)
    for _ in range(2):
        whole.update(model, batch, whole(model, batch))
        for part in (torch.arange(200, 256), torch.arange(200)):
            some = batch.take(part)
            halves.update(model, some, halves(model, some))
    assert torch.allclose(whole.start(batch), halves.start(batch), atol=1e-4)
    assert not torch.equal(whole.start(batch), fresh.start(batch))
    fresh.load_state_dict(whole.state_dict())
    assert torch.equal(fresh(model, batch), whole(model, batch))
    unseen = Batch(batch.x[:2], batch.y[:2], index=torch.tensor([5000, 3]))
    assert torch.equal(fresh.start(unseen)[0], PriorFGSM(THREAT).start(unseen)[0])
    assert not torch.equal(fresh.start(unseen)[1], PriorFGSM(THREAT).start(unseen)[1])


class Stop(Exception):
    pass


def test_a_killed_training_ends_in_the_same_bits(tmp_path: Any) -> None:
    asked = read(recipe(tmp_path, RECIPE, "prior_fgsm"), ['attack={use="prior_fgsm"}', "training.epochs=3"])
    straight = train_recipe(asked, tmp_path / "straight").load_state()

    def stop(record: Any) -> None:
        if record["epoch"] == 2 and "share" not in record:
            raise Stop

    with pytest.raises(Stop):
        train_recipe(asked, tmp_path / "resumed", progress=stop)
    resumed = train_recipe(asked, tmp_path / "resumed", resume=True).load_state()
    assert straight is not None
    assert resumed is not None
    assert straight["attack 0"]["delta"].dtype == torch.float16  # type: ignore[typeddict-item]
    for part in ("model", "attack 0"):
        for name, value in straight[part].items():  # type: ignore[literal-required]
            assert torch.equal(resumed[part][name], value), name  # type: ignore[literal-required]


@pytest.mark.parametrize("settings", [{"step_size": -0.1}, {"mode": "x"}, {"seed": -1.5}, {"loss": 3}])
def test_bad_settings(settings: dict[str, Any]) -> None:
    with pytest.raises(UnmovedError, match="PriorFGSM"):
        PriorFGSM(THREAT, **settings)
