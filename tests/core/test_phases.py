"""Ramps and phases are values: what holds at an epoch depends on the epoch alone."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from unmoved.core.batch import Batch
from unmoved.core.errors import UnmovedError
from unmoved.core.phases import Phases, Ramp, require_ramp, resolve
from unmoved.core.protocols import Method
from unmoved.core.threat import ThreatModel
from unmoved.core.views import Views

EXAMPLES = settings(max_examples=100, deadline=None, derandomize=True)
SHARES = st.floats(0, 1)
NUMBERS = st.floats(-1e3, 1e3)


@dataclass(frozen=True)
class Attack:
    """Holds a ramp in a nested value and things that never ramp beside it."""

    threat: ThreatModel
    steps: int = 10
    name: str = "pgd"

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        return batch.x


@dataclass(frozen=True)
class Weighted:
    weights: tuple[float | Ramp, ...]
    inner: Any = None

    def __call__(self, views: Views) -> Tensor:
        return views.y.float()


OBJECTIVE = Weighted((1.0, 6.0))


def method(eps: float | Ramp) -> Method:
    return Method(Attack(ThreatModel("linf", eps)), OBJECTIVE)


def eps_of(chosen: Method) -> float:
    return chosen.attack.threat.radius


# --- ramps


@EXAMPLES
@given(NUMBERS, NUMBERS, st.floats(0.01, 1), SHARES)
def test_a_ramp_is_the_line_through_its_ends_and_then_flat(
    start: float, stop: float, over: float, share: float
) -> None:
    ramp = Ramp(start, stop, over)
    expected = stop if share >= over else start * (1 - share / over) + stop * (share / over)
    assert ramp.at(share) == pytest.approx(expected, abs=1e-9)
    assert ramp.at(0) == start
    assert ramp.at(1) == ramp.at(over) == ramp.at(2)
    assert min(start, stop) - 1e-9 <= ramp.at(share) <= max(start, stop) + 1e-9


@EXAMPLES
@given(st.integers(0, 255), st.integers(0, 255))
def test_a_ramp_of_eps_ends_on_its_last_value(start: int, stop: int) -> None:
    assert Ramp(start / 255, stop / 255).at(1) == pytest.approx(stop / 255, rel=1e-15, abs=1e-16)


@pytest.mark.parametrize("over", [0, -0.5, 1.5, math.nan, "0.4", None])
def test_a_share_outside_0_1_is_refused(over: Any) -> None:
    with pytest.raises(UnmovedError, match=r"ramp.over: expected a finite number > 0 and <= 1, came .*; it is a share"):
        Ramp(0, 1, over)


def test_both_ends_of_a_ramp_obey_the_bounds_of_the_field() -> None:
    require_ramp("beta", 6.0, at_least=0)
    require_ramp("beta", Ramp(0, 6), at_least=0)
    for value, came in ((-1.0, "-1.0"), (Ramp(-2, 6), "-2"), (Ramp(0, -3), "-3")):
        with pytest.raises(UnmovedError, match=f"beta: expected a finite number >= 0, came {came}"):
            require_ramp("beta", value, at_least=0)
    with pytest.raises(UnmovedError, match=r"ramp.start: expected a finite number, came nan"):
        Ramp(math.nan, 1)


# --- resolve


def test_resolving_replaces_ramps_at_every_depth() -> None:
    term = Weighted((1.0, Ramp(0, 6), Ramp(2, 4, over=0.5)), inner=Weighted((Ramp(1, 0),), inner=(Ramp(0, 8), "x")))
    assert resolve(term, 0.5) == Weighted((1.0, 3.0, 4.0), inner=Weighted((0.5,), inner=(4.0, "x")))
    assert eps_of(resolve(method(Ramp(0, 0.3)), 0.5)) == pytest.approx(0.15)


def test_resolving_keeps_the_identity_of_what_does_not_ramp() -> None:
    """A stateful term or attack must stay the same object from step to step."""
    layer = nn.Linear(2, 2)
    for still in (method(0.1), OBJECTIVE, (1.0, OBJECTIVE), layer, 3, "x", None, Ramp, Weighted):
        assert resolve(still, 0.5) is still
    ramping = Method(Attack(ThreatModel("linf", Ramp(0, 0.3))), OBJECTIVE, defense=None)
    assert resolve(ramping, 0.5).objective is OBJECTIVE
    mixed = Weighted((Ramp(0, 1),), inner=layer)
    assert resolve(mixed, 0.5).inner is layer


def test_resolving_does_not_change_the_original() -> None:
    ramping = method(Ramp(0, 0.3))
    before = repr(ramping)
    resolve(ramping, 0.7)
    assert repr(ramping) == before


def test_a_class_may_say_how_it_is_rebuilt() -> None:
    @dataclass(frozen=True)
    class Own:
        weight: float | Ramp
        memory: list[int]

        def __replace__(self, **changes: Any) -> Own:
            return replace(self, memory=[*self.memory, 1], **changes)

    assert resolve(Own(Ramp(0, 1), []), 0.5) == Own(0.5, [1])


# --- phases


def test_each_epoch_has_the_method_of_its_phase() -> None:
    first, second, third = method(0.0), method(0.1), method(0.2)
    phases = Phases((0, first), (2, second), (5, third))
    chosen = [phases.at(epoch, 8) for epoch in (0, 1.99, 2, 4.5, 5, 7.9, 100)]
    assert [m is k for m, k in zip(chosen, [first, first, second, second, third, third, third], strict=True)] == [
        True
    ] * 7


def test_a_ramp_runs_over_its_own_phase() -> None:
    phases = Phases((0, method(Ramp(0, 0.1))), (4, method(Ramp(0.1, 0.3, over=0.5))))
    expected = {0: 0.0, 2: 0.05, 3.999: 0.1, 4: 0.1, 5: 0.15, 6: 0.2, 8: 0.3, 10: 0.3, 12: 0.3}
    assert {epoch: round(eps_of(phases.at(epoch, 12)), 3) for epoch in expected} == expected


@EXAMPLES
@given(st.floats(0, 9.99), st.integers(1, 10))
def test_resuming_needs_nothing_but_the_epoch(epoch: float, epochs: int) -> None:
    phases = Phases((0, method(Ramp(0, 0.3, over=0.4))), (3, method(0.2)))
    for other in (0.0, 5.0, 9.0):
        phases.at(other, epochs)
    fresh = Phases((0, method(Ramp(0, 0.3, over=0.4))), (3, method(0.2)))
    assert phases.at(epoch, epochs) == fresh.at(epoch, epochs)


def test_anything_that_names_phases_becomes_phases() -> None:
    one = method(0.1)
    phases = Phases((0, one))
    assert Phases.of(phases) is phases
    assert Phases.of(one) == phases
    assert Phases.of([(0, one)]) == Phases.of(((0, one),)) == phases
    assert phases != Phases((0, method(0.2)))


@pytest.mark.parametrize("starts", [(), (1,), (0, 0), (0, 3, 2), (-1, 2)])
def test_starts_that_do_not_increase_from_zero_are_refused(starts: tuple[int, ...]) -> None:
    with pytest.raises(UnmovedError, match=r"phases: expected starts 0 < ... increasing, came \["):
        Phases(*[(start, method(0.1)) for start in starts])


def test_the_repr_of_phases_rebuilds_them() -> None:
    phases = Phases((0, Method(None, OBJECTIVE)))
    names = {"Phases": Phases, "Method": Method, "Weighted": Weighted}
    assert eval(repr(phases), names) == phases


def test_clean_training_is_a_method_without_an_attack() -> None:
    assert Phases.of(Method(None, OBJECTIVE)).at(3, 5).attack is None
    assert torch.equal(OBJECTIVE(Views.of(y=torch.tensor([1, 0]))), torch.tensor([1.0, 0.0]))
