"""Every count and number of every exported value: which kinds of number it takes, and what the others are told."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch

import unmoved
from unmoved import attacks, data, defenses, models, terms
from unmoved.core.errors import UnmovedError, require_number, require_seed, require_whole
from unmoved.core.phases import Ramp
from unmoved.core.threat import ThreatModel
from unmoved.training import averaging, optim

BALL = ThreatModel("l2", 0.5)
# What has to be given to make the value at all.
NEEDED: dict[str, Any] = {
    "threat": BALL,
    "source": models.linear((1, 2, 2), 3),
    "shape": (1, 28, 28),
    "num_classes": 3,
    "milestones": (2, 4),
    "norm": "l2",
    "eps": 0.5,
    "start": 0.25,
    "stop": 0.5,
}
# Defaults that would make the tests slow.
SMALL: dict[str, Any] = {"width": 1, "depth": 10}
MAKERS: dict[str, Callable[..., Any]] = {
    f"{namespace.__name__.rpartition('.')[2]}.{name}": getattr(namespace, name)
    for namespace in (attacks, defenses, terms, models)
    for name in namespace.__all__
    if name not in ("StoppingRule", "Sum", "timm")
}
MAKERS |= {
    f"{kind.__module__.rpartition('.')[2]}.{kind.__name__}": kind
    for kind in (
        *optim.OPTIMIZERS,
        *optim.SCHEDULES,
        averaging.EMA,
        averaging.SWA,
        data.PadCrop,
        data.Flip,
        data.Cutout,
    )
}
MAKERS |= {"threat.ThreatModel": ThreatModel, "schedule.Ramp": Ramp}


def is_number(parameter: inspect.Parameter) -> bool:
    kind = str(parameter.annotation)
    return kind.split(" | ")[0] in ("int", "float") or kind == "tuple[int, ...]"


# The norm of APD's ball is one of two values.
SETTINGS = [
    pytest.param(maker, parameter, id=f"{name}.{parameter.name}")
    for name, maker in MAKERS.items()
    for parameter in inspect.signature(maker).parameters.values()
    if is_number(parameter) and (maker, parameter.name) != (defenses.APD, "p")
]


FLAGS = [
    pytest.param(maker, parameter, id=f"{name}.{parameter.name}")
    for name, maker in MAKERS.items()
    for parameter in inspect.signature(maker).parameters.values()
    if str(parameter.annotation) == "bool"
]


def made(maker: Callable[..., Any], parameter: inspect.Parameter, value: Any) -> Any:
    needed = {name: NEEDED[name] for name in inspect.signature(maker).parameters if name in NEEDED}
    needed = {name: needed[name] for name in needed if is_required(maker, name)}
    needed |= {name: SMALL[name] for name in inspect.signature(maker).parameters if name in SMALL}
    return maker(**needed | {parameter.name: (value,) if "tuple" in str(parameter.annotation) else value})


def is_required(maker: Callable[..., Any], name: str) -> bool:
    return inspect.signature(maker).parameters[name].default is inspect.Parameter.empty


def usual(parameter: inspect.Parameter) -> Any:
    """A value that the setting certainly takes."""
    default = SMALL.get(parameter.name, parameter.default)
    if default in (inspect.Parameter.empty, None):
        default = {"step_size": 0.25, "n": 3, "size": 3}.get(parameter.name, NEEDED.get(parameter.name, 0.25))
    return default[0] if isinstance(default, tuple) else default


def is_count(parameter: inspect.Parameter) -> bool:
    return str(parameter.annotation).startswith(("int", "tuple"))


def test_the_settings_are_found() -> None:
    names = {str(case.id) for case in SETTINGS}
    assert len(names) > 70
    assert {"attacks.PGD.steps", "attacks.IAAT.gamma", "defenses.APD.n", "optim.MultiStep.milestones"} <= names
    assert len(FLAGS) >= 10
    assert {"terms.GlobalProbability.num_classes", "models.mlp.hidden", "attacks.Square.p", "augment.Flip.p"} <= names


@pytest.mark.parametrize(("maker", "parameter"), SETTINGS)
def test_numbers_of_every_kind_are_taken_and_repr_rebuilds_the_value(
    maker: Callable[..., Any], parameter: inspect.Parameter
) -> None:
    value = usual(parameter)
    if is_count(parameter):
        kinds = [
            float(value),
            np.int64(value),
            np.int16(value),
            np.float32(value),
            torch.tensor(value),
            Fraction(value),
        ]
    else:
        kinds = [np.float64(value), torch.tensor(value, dtype=torch.float64), np.array(value), Fraction(value)]
    torch.manual_seed(0)
    plain = made(maker, parameter, value)
    for kind in kinds:
        torch.manual_seed(0)
        other = made(maker, parameter, kind)
        assert repr(other) == repr(plain)
        field = getattr(other, parameter.name, None)
        assert not isinstance(field, np.generic | torch.Tensor | Fraction)
        assert not (is_count(parameter) and isinstance(field, float))


@pytest.mark.parametrize(("maker", "parameter"), SETTINGS)
def test_what_is_no_number_is_refused_when_the_value_is_made(
    maker: Callable[..., Any], parameter: inspect.Parameter
) -> None:
    wrong: list[Any] = [math.nan, math.inf, -math.inf, True, "1", "8/255", 1j, [1], np.array([1, 2]), np.bool_(True)]
    wrong += [] if "None" in str(parameter.annotation) else [None]
    wrong += [usual(parameter) + 0.5, np.float32(2.5), 2.9999999999999996] if is_count(parameter) else []
    for value in wrong:
        with pytest.raises(UnmovedError, match=rf"({parameter.name}|weight of).*: expected a (whole|finite) number"):
            made(maker, parameter, value)


@pytest.mark.parametrize(("maker", "parameter"), FLAGS)
def test_a_flag_is_true_or_false(maker: Callable[..., Any], parameter: inspect.Parameter) -> None:
    value = parameter.default
    torch.manual_seed(0)
    plain = repr(made(maker, parameter, value))
    torch.manual_seed(0)
    assert repr(made(maker, parameter, np.bool_(value))) == plain
    for wrong in ("no", "false", 0, 1, None, 1.0):
        with pytest.raises(UnmovedError, match=rf"{parameter.name}: expected true or false, came"):
            made(maker, parameter, wrong)


def test_the_messages_say_what_to_do() -> None:
    with pytest.raises(UnmovedError, match=r"steps: expected a whole number >= 1, came 2.5; round it$"):
        require_whole("steps", 2.5, at_least=1)
    with pytest.raises(UnmovedError, match=r"eps: expected a finite number >= 0, came '8/255'; leave out the quotes$"):
        require_number("eps", "8/255", at_least=0)
    with pytest.raises(UnmovedError, match=r"steps: expected a whole number <= 9, came one of 33220 bits"):
        require_whole("steps", 10**10_000, at_most=9)
    with pytest.raises(UnmovedError, match=r"APD.p: unknown value 'inf'; leave out the quotes"):
        defenses.APD(0.1, p="inf")  # type: ignore[arg-type]
    with pytest.raises(UnmovedError, match="seed: expected a whole number"):
        require_seed("seed", 2**63)
    assert require_whole("steps", (8 / 255) / (2 / 255)) == 4


def test_functions_take_the_same_numbers() -> None:
    split = data.ArraySplit.of(torch.rand(8, 1, 4, 4), torch.arange(8) % 2, layout="NCHW")
    assert [len(batch) for batch in split.batches(np.int64(3), shuffle=np.int64(1))] == [3, 3, 2]
    assert len(split.take(4.0, seed=0.0)) == len(split.part(np.int64(1), 2.0)) == 4
    held = [len(part) for part in split.hold_out(np.float64(0.25), seed=np.int64(0))]
    assert held == [len(part) for part in split.hold_out(2.0, seed=0)] == [6, 2]
    table = unmoved.evaluate(
        models.linear((1, 4, 4), 2), split, {"pgd": attacks.PGD(BALL)}, BALL, batch_size=np.int64(4), workers=1.0
    )
    assert len(table) == 8
    for bad in ({"batch_size": 2.5}, {"workers": "2"}, {"batch_size": True}):
        with pytest.raises(UnmovedError, match="expected a whole number"):
            unmoved.evaluate(models.linear((1, 4, 4), 2), split, {"pgd": attacks.PGD(BALL)}, BALL, **bad)
    method = unmoved.Method(None, terms.CE("clean"))
    log = unmoved.train(models.linear((1, 4, 4), 2), method, split, epochs=1.0, batch_size=4.0, seed=np.int64(3))
    assert len(log) == 1
    for bad in ({"epochs": 1.5}, {"seed": "0"}, {"batch_size": None}, {"seed": 2**70}):
        with pytest.raises(UnmovedError, match="expected a whole number"):
            unmoved.train(models.linear((1, 4, 4), 2), method, split, **bad)
