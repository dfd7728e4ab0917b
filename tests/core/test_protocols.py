"""The language: a batch is well formed or refused in words, and what acts is told by what it can do."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from unmoved import attacks, terms
from unmoved.core.batch import Batch
from unmoved.core.errors import UnmovedError, did_you_mean, require_choice, require_number
from unmoved.core.protocols import (
    ATTACK_KINDS,
    Attack,
    Method,
    ParameterDefense,
    StatefulAttack,
    StatefulTerm,
    Term,
    couples_samples,
    draws_of,
    is_lockstep,
    is_minimum_norm,
    kind_of,
    kinds_of,
    leaves_ball,
    takes_mixed,
)
from unmoved.core.threat import ThreatModel
from unmoved.core.views import Views

X, Y = torch.rand(4, 1, 2, 2), torch.tensor([0, 1, 2, 1])


# --- batches


def test_samples_are_numbered_unless_they_have_names() -> None:
    assert Batch(X, Y).index.tolist() == [0, 1, 2, 3]
    assert Batch(X, Y, torch.tensor([9, 8, 7, 6])).index.tolist() == [9, 8, 7, 6]
    assert (Batch(X, Y).step, len(Batch(X, Y))) == (0, 4)
    assert Batch(X.double(), Y).x.dtype == torch.float64
    assert len(Batch(X[:0], Y[:0])) == 0


@pytest.mark.parametrize(
    "which", [torch.tensor([True, False, False, True]), torch.tensor([3, 0, 0]), torch.tensor([], dtype=torch.int64)]
)
def test_taking_samples_keeps_who_they_are(which: Tensor) -> None:
    batch = Batch(X, Y, torch.tensor([9, 8, 7, 6]), step=3)
    part = batch.take(which)
    assert torch.equal(part.x, X[which])
    assert torch.equal(part.y, Y[which])
    assert torch.equal(part.index, batch.index[which])
    assert part.step == 3


def test_a_batch_moves_as_a_whole() -> None:
    moved = Batch(X, Y, step=5).to("meta")
    assert {moved.x.device.type, moved.y.device.type, moved.index.device.type} == {"meta"}
    assert moved.step == 5


def test_a_batch_is_frozen_and_equal_only_to_itself() -> None:
    batch = Batch(X, Y)
    with pytest.raises(dataclasses.FrozenInstanceError):
        batch.step = 1
    assert batch == batch
    assert batch != Batch(X, Y)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"x": (X * 255).byte()}, r"Batch.x: expected float images .*, came torch.uint8 .*; convert with .* / 255"),
        ({"x": X.flatten()}, r"Batch.x: expected float images \(B, C, H, W\) .*, came torch.float32 \(16,\)"),
        ({"x": X[:3]}, r"Batch.y: expected int64 labels of shape \(3,\), came torch.int64 \(4,\)"),
        ({"y": Y.int()}, r"came torch.int32 \(4,\); convert with labels.long\(\)"),
        ({"y": Y.float()}, r"came torch.float32 \(4,\)"),
        ({"y": torch.eye(4, dtype=torch.int64)}, r"expected int64 labels of shape \(4,\), came torch.int64 \(4, 4\)"),
        ({"index": torch.arange(3)}, r"Batch.index: expected .*shape \(4,\), came .*\(3,\)"),
    ],
)
def test_what_is_no_batch_says_why(given: dict[str, Any], message: str) -> None:
    with pytest.raises(UnmovedError, match=message):
        Batch(**{"x": X, "y": Y} | given)


@pytest.mark.parametrize(
    "given",
    [
        pytest.param({"x": X.numpy()}, id="numpy images"),
        pytest.param({"y": [0, 1, 2, 1]}, id="a list of labels"),
        pytest.param({"y": torch.tensor(1)}, id="one label"),
        pytest.param({"index": torch.arange(4.0)}, id="float index"),
        pytest.param({"index": torch.arange(4, dtype=torch.int32)}, id="int32 index"),
        pytest.param({"index": np.arange(4)}, id="numpy index"),
    ],
)
def test_what_is_no_tensor_of_the_right_type_says_why(given: dict[str, Any]) -> None:
    with pytest.raises(UnmovedError, match="Batch"):
        Batch(**{"x": X, "y": Y} | given)


# --- what acts


class Remembering:
    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        return batch.x

    def update(self, model: nn.Module, batch: Batch, x_adv: Tensor) -> None: ...

    def state_dict(self) -> dict[str, Tensor]:
        return {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None: ...


def identity(model: nn.Module, batch: Batch) -> Tensor:
    return batch.x


def step(model: nn.Module, optimizer: Optimizer, backward: Callable[[], Tensor]) -> Tensor:
    return backward()


def test_a_stateful_attack_is_told_by_its_memory() -> None:
    assert isinstance(Remembering(), Attack)
    assert isinstance(Remembering(), StatefulAttack)
    assert isinstance(identity, Attack)  # a plain function will do
    assert not isinstance(identity, StatefulAttack)
    assert isinstance(step, ParameterDefense)
    assert torch.equal(Remembering()(nn.Identity(), Batch(X, Y)), identity(nn.Identity(), Batch(X, Y)))


def test_a_stateful_term_learns_nothing_until_it_says_so() -> None:
    class Centre(StatefulTerm):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(2))
            self.register_buffer("seen", torch.zeros((), dtype=torch.int64))

        def forward(self, views: Views) -> Tensor:
            return views.clean @ self.weight

        def update(self, views: Views) -> None:
            self.seen += len(views.y)

    views = Views.of(y=Y % 2, clean=torch.rand(4, 2))
    with pytest.raises(NotImplementedError):
        StatefulTerm()(views)
    StatefulTerm().update(views)
    term = Centre()
    assert isinstance(term, Term)
    assert term(views).shape == (4,)
    term.update(views)
    assert set(term.state_dict()) == {"weight", "seen"}  # both reach the checkpoint, the weight the optimizer too
    assert term.seen == 4
    assert SGD(term.parameters(), lr=0.1).param_groups[0]["params"] == [term.weight]


def test_a_method_is_a_frozen_value() -> None:
    method = Method(identity, nn.Identity())
    assert method.defense is None
    assert dataclasses.replace(method, attack=None).attack is None
    with pytest.raises(dataclasses.FrozenInstanceError):
        method.attack = None


# --- the words of errors


def test_a_near_name_is_suggested_and_otherwise_all_are_listed() -> None:
    assert did_you_mean("apw", ["sam", "awp"]) == "; did you mean 'awp'?"
    assert did_you_mean("PGD", ["pgd", "apgd"]) == "; did you mean 'pgd'?"
    assert did_you_mean("zzz", ["sam", "awp"]) == "; known: awp, sam"
    assert did_you_mean("zzz", []) == "; known: none"


@pytest.mark.parametrize("value", [1, 0.5, 1.0])
def test_a_number_within_its_bounds_passes(value: float) -> None:
    require_number("x", value, above=0, at_most=1)
    require_number("x", value, at_least=value)


@pytest.mark.parametrize("value", [0, -1, 1.5, True, "1", None, float("nan"), float("inf"), torch.tensor([0.5])])
def test_a_number_outside_its_bounds_is_named(value: Any) -> None:
    with pytest.raises(UnmovedError, match=r"x: expected a finite number > 0 and <= 1, came .*; a hint"):
        require_number("x", value, above=0, at_most=1, advice="a hint")


def test_a_choice_is_one_of_those_offered() -> None:
    require_choice("mode", "eval", ("eval", "train"))
    with pytest.raises(UnmovedError, match=r"mode: unknown value 'trian'; did you mean 'train'\?"):
        require_choice("mode", "trian", ("eval", "train"))


# --- what attacks and terms declare

BALL = ThreatModel("linf", 0.1)


class Shift:
    """A stranger's attack, which declares nothing."""

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        return batch.x


def declaring(**attributes: object) -> Any:
    return type("Declaring", (Shift,), attributes)()


def test_what_declares_nothing_is_taken_for_the_default() -> None:
    assert (kind_of(Shift()), draws_of(Shift()), is_lockstep(Shift())) == ("gradients", 1, False)
    assert not is_minimum_norm(Shift())
    assert not leaves_ball(Shift())
    assert not takes_mixed(Shift())
    assert not couples_samples(lambda views: views.y)


def test_a_strangers_part_declares_it_too() -> None:
    attack = declaring(kind="queries", draws=5, lockstep=True, minimum_norm=True)
    assert (kind_of(attack), draws_of(attack), is_lockstep(attack)) == ("queries", 5, True)
    assert is_minimum_norm(attack)
    assert is_minimum_norm(attacks.Transfer(BALL, nn.Linear(1, 1), attack))
    assert leaves_ball(attacks.Transfer(BALL, nn.Linear(1, 1), declaring(leaves_ball=True)))
    term = type("Coupled", (), {"couples_samples": True, "__call__": lambda self, views: views.y})()
    assert couples_samples(term)


@pytest.mark.parametrize(
    ("read", "attributes", "words"),
    [
        (kind_of, {"kind": "query"}, "Declaring.kind: unknown value 'query'; did you mean 'queries'"),
        (draws_of, {"draws": 0}, "Declaring.draws: expected a whole number >= 1, came 0"),
        (is_lockstep, {"lockstep": "no"}, "Declaring.lockstep: expected true or false, came 'no'"),
        (is_minimum_norm, {"minimum_norm": 1}, "Declaring.minimum_norm: expected true or false, came 1"),
        (leaves_ball, {"leaves_ball": "yes"}, "Declaring.leaves_ball: expected true or false, came 'yes'"),
        (takes_mixed, {"takes_mixed": "yes"}, "Declaring.takes_mixed: expected true or false, came 'yes'"),
        (couples_samples, {"couples_samples": 1}, "Declaring.couples_samples: expected true or false, came 1"),
    ],
)
def test_a_wrong_declaration_is_refused(
    read: Callable[[Any], object], attributes: dict[str, object], words: str
) -> None:
    with pytest.raises(UnmovedError, match=words):
        read(declaring(**attributes))


def test_what_the_exported_attacks_declare() -> None:
    source = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
    declared = {
        "gradients": [attacks.APGD(BALL), attacks.IAAT(BALL), attacks.FAB(BALL), attacks.DeepFool(BALL)],
        "fixed-step gradients": [attacks.PGD(BALL), attacks.FGSM(BALL), attacks.NFGSM(BALL), attacks.PriorFGSM(BALL)],
        "queries": [attacks.Square(BALL), attacks.SPSA(BALL), attacks.HopSkipJump(BALL)],
        "transfer": [attacks.Transfer(BALL, source)],
    }
    assert tuple(declared) == ATTACK_KINDS
    for kind, those in declared.items():
        assert [kind_of(attack) for attack in those] == [kind] * len(those)
    assert draws_of(attacks.APGD(BALL, draws=7)) == 7
    stopped = attacks.PGD(BALL, stop=attacks.Sensible(0.5))
    lockstep = [is_lockstep(attack) for attack in (attacks.PGD(BALL), attacks.IAAT(BALL), stopped, attacks.APGD(BALL))]
    assert lockstep == [True, True, False, False]
    anywhere, inside = (attacks.FAB, attacks.FMN, attacks.DeepFool, attacks.HopSkipJump), (attacks.PGD, attacks.Square)
    assert all(is_minimum_norm(make(BALL)) for make in anywhere)
    assert not any(is_minimum_norm(make(BALL)) for make in inside)
    assert [leaves_ball(make(BALL)) for make in (attacks.NFGSM, attacks.FGSM, attacks.FAB)] == [True, False, False]


def test_an_ensemble_is_of_the_kinds_of_its_parts() -> None:
    whole, random = attacks.AutoAttack(BALL), attacks.AutoAttack(BALL, version="rand")
    assert kinds_of("autoattack", whole, 10)["square"] == "queries"
    assert set(kinds_of("autoattack", random, 10).values()) == {"gradients"}
    assert kinds_of("mine", declaring(kind="transfer"), 10) == {"mine": "transfer"}


def test_a_sum_couples_its_samples_where_one_of_its_terms_does() -> None:
    coupled = terms.Sum((1, terms.CE()), (2, terms.Sum((1, terms.PRSL()), (1, terms.KL()))))
    assert couples_samples(coupled)
    assert not couples_samples(terms.TRADES())
