"""One step: what it refuses before anything is changed, and what it may not wait for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unmoved import data, terms, train, train_step
from unmoved.attacks import PGD, Transfer
from unmoved.core import preconditions
from unmoved.core.batch import Batch
from unmoved.core.errors import UnmovedError
from unmoved.core.phases import Phases
from unmoved.core.protocols import Method
from unmoved.core.threat import ThreatModel
from unmoved.training import averaging, optim

THREAT = ThreatModel("linf", 0.1)
CLEAN, MADRY = Method(None, terms.CE("clean")), Method(PGD(THREAT, steps=2), terms.CE())


class InPlace(nn.Module):
    """A linear model that normalises where the images lie."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(36, 3)

    def forward(self, x: Tensor) -> Tensor:
        x.sub_(0.5).div_(0.25)
        return self.linear(x.flatten(1))


class Copying(InPlace):
    def forward(self, x: Tensor) -> Tensor:
        return self.linear(((x - 0.5) / 0.25).flatten(1))


def a_batch() -> Batch:
    x = torch.rand(8, 1, 6, 6, generator=torch.Generator().manual_seed(0))
    return Batch(x, torch.arange(8) % 3)


def step(method: Any, batch: Any, model: nn.Module | None = None, **settings: Any) -> nn.Module:
    model = Copying() if model is None else model
    train_step(model, method, torch.optim.SGD(model.parameters(), 0.1), batch, "float32", **settings)
    return model


@pytest.mark.parametrize("method", [CLEAN, MADRY, Method(lambda model, batch: batch.x, terms.CE())])
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda b: replace(b, x=(b.x - 0.5) / 0.25), "put the normalisation inside the model"),
        (lambda b: replace(b, x=b.x * 255), "divide by 255"),
        (lambda b: replace(b, x=b.x * float("nan")), "NaN"),
        (lambda b: replace(b, y=b.y + 1), "labels: expected 0..2 for 3 logits, came 3"),
        (lambda b: replace(b, y=b.y - 1), "labels: expected 0..2, came -1"),
        (lambda b: (b.x, b.y), r"a Method and a Batch, came .*, Method, tuple"),
    ],
)
def test_refuses_a_batch_before_anything_is_changed(method: Method, change: Callable[[Batch], Any], words: str) -> None:
    model = Copying()
    with pytest.raises(UnmovedError, match=words):
        step(method, change(a_batch()), model)
    assert torch.equal(model.linear.weight, Copying().linear.weight)


@pytest.mark.parametrize(
    ("objective", "words"),
    [
        (
            lambda views: F.cross_entropy(views.adv, views.y),
            r"\(8,\), came torch.float32 of shape \(\)",
        ),
        (lambda views: terms.CE()(views)[:, None], "squeeze"),
        (lambda views: views.adv, "sum over the classes"),
        (lambda views: None, "came NoneType"),
        (terms.Sum((1.0, terms.CE()), (0.5, lambda views: views.adv.square().mean())), "leave the mean out"),
    ],
)
def test_refuses_an_objective_that_is_no_number_for_each_sample(objective: Any, words: str) -> None:
    model = Copying()
    with pytest.raises(UnmovedError, match=words):
        step(Method(None, objective), a_batch(), model)
    assert torch.equal(model.linear.weight, Copying().linear.weight)


def test_an_attack_is_no_method() -> None:
    with pytest.raises(UnmovedError, match=r"a Method and a Batch, came .*, PGD, Batch"):
        step(PGD(THREAT), a_batch())
    with pytest.raises(UnmovedError, match=r"method: expected Method\(attack, objective, defense\), came PGD"):
        Phases.of(PGD(THREAT))  # type: ignore[arg-type]
    with pytest.raises(UnmovedError, match=r"phases: expected pairs \(from_epoch, Method"):
        Phases.of([(0, PGD(THREAT))])  # type: ignore[list-item]


def test_bounds_are_those_of_the_attack() -> None:
    wide = ThreatModel("linf", 8.0, (0, 255))
    batch = replace(a_batch(), x=a_batch().x * 255)
    for attack in (PGD(wide, steps=1), Transfer(wide, Copying())):
        step(Method(attack, terms.CE()), batch)
    step(CLEAN, batch, bounds=(0, 255))  # a phase without an attack is told by the loop
    with pytest.raises(UnmovedError, match=r"\[0, 255\]"):
        step(Method(PGD(wide, steps=1), terms.CE()), replace(batch, x=batch.x - 1))


@pytest.mark.parametrize("method", [CLEAN, MADRY, Method(PGD(THREAT, steps=2, loss=terms.KL()), terms.TRADES())])
def test_a_forward_that_writes_into_its_input_trains_as_one_that_does_not(method: Method) -> None:
    batch = a_batch()
    model = step(method, batch, InPlace())
    assert torch.equal(batch.x, a_batch().x)
    assert torch.allclose(model.linear.weight, step(method, a_batch()).linear.weight, atol=1e-6)  # type: ignore[operator]


def test_the_accuracy_of_a_step_is_on_what_it_trains_on() -> None:
    """The attacked images wherever the objective asks for them, as TRADES does beside the clean ones."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(1, 2))
    model[1].weight.data = torch.tensor([[-1.0], [1.0]])
    model[1].bias.data = torch.tensor([0.5, -0.5])
    batch = Batch(torch.full((4, 1, 1, 1), 0.9), torch.ones(4).long())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    for objective, accuracy in ((terms.TRADES(), 0), (terms.MART(), 0), (terms.CE(), 0), (terms.CE("clean"), 1)):
        method = Method(lambda model, batch: 1 - batch.x, objective)  # across the boundary
        assert train_step(model, method, optimizer, batch, "float32").accuracy == accuracy


@pytest.mark.parametrize("watch", [True, False])
def test_only_a_watched_step_looks_at_values_on_a_device(watch: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    looked = []
    real = preconditions._may_look
    monkeypatch.setattr(preconditions, "_may_look", lambda values: looked.append(real(values)))
    step(MADRY, a_batch(), watch=watch)
    assert len(looked) >= 3
    assert set(looked) == {watch}


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"optimizer": optim.SGD}, r"optimizer: .*the class SGD; use SGD\(\.\.\.\)"),
        ({"schedule": optim.Cosine}, "schedule: .*the class Cosine"),
        ({"schedule": None}, "schedule: .*came None"),
        ({"average": averaging.EMA}, "average: .*the class EMA"),
        ({"augment": data.Flip}, "augment: .*the class Flip"),
        ({"check": PGD}, "check: .*the class PGD"),
        ({"check": terms.CE()}, "check: .*came CE"),
        ({"threat": "linf"}, "threat: expected a ThreatModel"),
    ],
)
def test_a_training_refuses_classes_in_place_of_what_they_make(settings: dict[str, Any], words: str) -> None:
    split = data.ArraySplit.of(a_batch().x, a_batch().y, layout="NCHW")
    with pytest.raises(UnmovedError, match=words):
        train(Copying(), CLEAN, split, epochs=1, **({"validation": split, "threat": THREAT} | settings))


def test_images_made_in_inference_mode_are_still_trained_on() -> None:
    batch, states = a_batch(), []
    with torch.inference_mode():
        made = Batch(batch.x + 0, batch.y, batch.index)
    for given in (batch, made):
        model = Copying().train()
        attack = PGD(THREAT, loss=terms.KL(), start="gaussian", steps=2)
        train_step(model, Method(attack, terms.CE()), torch.optim.SGD(model.parameters(), lr=0.1), given, "float32")
        states.append(model.state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
