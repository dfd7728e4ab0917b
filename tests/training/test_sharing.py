"""Clean logits shared by attack and objective: one pass less, and not one bit of the step changes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from unmoved import Batch, Method, ThreatModel, attacks, defenses, models, terms, train_step
from unmoved.attacks import PGD
from unmoved.core import views
from unmoved.data import digits
from unmoved.training import sharing

THREAT = ThreatModel("linf", 0.1)
BATCH = next(digits(test=1600).train.batches(16))
CLIMB = PGD(THREAT, loss=terms.KL(), start="gaussian", steps=3)
TRADES = Method(CLIMB, terms.TRADES())


def cnn(dropout: float = 0.0) -> nn.Sequential:
    torch.manual_seed(0)
    model = models.small_cnn((1, 8, 8), 10, padding=1, width=4, dropout=dropout, mean=[0.3], std=[0.5])
    nn.init.normal_(model.get_parameter("classifier.fc3.weight"), std=0.3)  # zero as made: nothing to attack
    return model


def stepped(model: nn.Module, method: Method, form: str = "float32") -> tuple[dict[str, Tensor], int]:
    """(state after a step on a copy, passes of the model)."""
    model, passes, real = copy.deepcopy(model).train(), 0, views.logits

    def counted(model: nn.Module, x: Tensor) -> Tensor:
        nonlocal passes
        passes += 1
        return real(model, x)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(views, "logits", counted)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        train_step(model, method, optimizer, BATCH, form)
    return model.state_dict(), passes


class Moved:
    """An attack that starts its search elsewhere: those are other images, with logits of their own."""

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        return CLIMB(model, replace(batch, x=THREAT.project(batch.x + 0.1, batch.x)))


class InPlace:
    """The same, in the same memory, after a search that asked for the logits of what was there."""

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        kept, _ = batch.x.clone(), CLIMB(model, batch)
        batch.x.add_(0.1).clamp_(0, 1)
        x_adv = CLIMB(model, batch)
        batch.x.copy_(kept)
        return x_adv


def halved_first(model: nn.Module, optimizer: torch.optim.Optimizer, backward: Callable[[], Tensor]) -> Tensor:
    """A defense that asks for no gradient at the weights that the attack saw."""
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(0.5)
    return defenses.Plain()(model, optimizer, backward)


@pytest.mark.parametrize(
    ("method", "saved"),
    [
        (TRADES, 1),
        (Method(CLIMB, terms.MART()), 1),
        (Method(PGD(THREAT, loss=terms.KL(), steps=3, stop=attacks.Friendly(tau=1)), terms.TRADES()), 1),
        (Method(CLIMB, terms.TRADES(), defenses.AWP(gamma=0.01)), 1),
        (Method(CLIMB, terms.CE()), 0),  # the objective reads no clean view
        (Method(PGD(THREAT, steps=3), terms.TRADES()), 0),  # the attack reads none
        (Method(Moved(), terms.TRADES()), 0),
        (Method(InPlace(), terms.TRADES()), 0),
        (Method(CLIMB, terms.TRADES(), halved_first), 0),
        (Method(attacks.FAB(THREAT, steps=2), terms.TRADES()), 0),
        (Method(replace(CLIMB, smooth=10.0), terms.TRADES()), 0),  # its ReLUs are not those that are trained
    ],
    ids=["trades", "mart", "stop", "awp", "ce", "ce-attack", "moved", "in-place", "weights-moved", "fab", "smooth"],
)
def test_a_pass_is_saved_and_no_bit_changes(method: Method, saved: int, monkeypatch: pytest.MonkeyPatch) -> None:
    state, passes = stepped(cnn(), method)
    monkeypatch.setattr(sharing, "is_modeless", lambda model: False)
    expected, all_passes = stepped(cnn(), method)
    assert all_passes - passes == saved
    assert all(torch.equal(state[name], expected[name]) for name in expected)


def test_under_bf16_the_search_in_float32_does_not_take_rough_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    @torch.no_grad()
    def exact(model: nn.Module, batch: Batch) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            return CLIMB(model, batch)

    state, _ = stepped(cnn(), Method(exact, terms.TRADES()), "bf16")
    shared, passes = stepped(cnn(), TRADES, "bf16")
    before = cnn().state_dict()
    monkeypatch.setattr(sharing, "is_modeless", lambda model: False)
    alone, _ = stepped(cnn(), Method(exact, terms.TRADES()), "bf16")
    assert all(torch.equal(state[name], alone[name]) for name in alone)
    expected, all_passes = stepped(cnn(), TRADES, "bf16")
    assert all_passes - passes == 1
    # The two views' gradients then meet in float32, not in bf16 with its 8 bits: the step is a little more exact.
    for name, weights in expected.items():
        assert (shared[name] - weights).abs().max() <= 0.02 * (weights - before[name]).abs().max(), name


def test_a_term_that_takes_what_is_there_is_not_handed_what_nobody_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """`GlobalProbability` follows the views that the objective has computed; the attack's are not among them."""
    seen = []
    for is_modeless in (sharing.is_modeless, lambda model: False):
        monkeypatch.setattr(sharing, "is_modeless", is_modeless)
        term = terms.GlobalProbability(10, view="adv")
        stepped(cnn(), Method(CLIMB, terms.Sum((1, terms.CE()), (1, term))))
        seen.append(term.seen.clone())
    assert torch.equal(*seen)
    assert seen[0][0].count_nonzero() == 0
    assert seen[0][1].count_nonzero() > 0


def test_images_made_in_inference_mode_are_still_trained_on() -> None:
    with torch.inference_mode():
        batch = Batch(BATCH.x + 0, BATCH.y, BATCH.index)
    states = []
    for given in (BATCH, batch):
        model = cnn().train()
        train_step(model, Method(CLIMB, terms.CE()), torch.optim.SGD(model.parameters(), lr=0.1), given, "float32")
        states.append(model.state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


class Custom(nn.Sequential):
    """Of a stranger's forward nothing is known."""


def hooked() -> nn.Module:
    model = cnn()
    model.register_forward_hook(lambda *_: None)
    return model


@pytest.mark.parametrize(
    ("build", "expected"),
    [
        (cnn, True),
        (lambda: models.linear((1, 8, 8), 10), True),
        (lambda: models.mlp((1, 8, 8), 10), True),
        (lambda: cnn(dropout=0.5), False),
        (lambda: models.preact_resnet18((1, 8, 8), 10, width=4), False),
        (lambda: nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(72, 10)), False),
        (lambda: Custom(nn.Flatten(), nn.Linear(64, 10)), False),
        (hooked, False),
    ],
    ids=["cnn", "linear", "mlp", "dropout", "resnet", "batchnorm", "custom", "hooked"],
)
def test_only_models_that_know_no_mode_share(build: Any, expected: bool) -> None:
    assert sharing.is_modeless(build()) == expected
