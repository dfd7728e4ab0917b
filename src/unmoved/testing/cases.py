"""Make terms, attacks and defenses from their constructors, so that a new one is checked without being listed."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator
from types import ModuleType
from typing import TypeVar

from torch import Tensor, nn

from unmoved.core.errors import UnmovedError
from unmoved.core.threat import ThreatModel
from unmoved.testing.fixtures import ExamFailed

Made = TypeVar("Made")
Make = Callable[..., object]
BALLS = (ThreatModel("linf", 0.1), ThreatModel("l2", 0.5), ThreatModel("l1", 1.0))


def default_case(make: Callable[..., Made], **given: object) -> Made:
    """Call a constructor with those of its required arguments that are given; everything else is its default.

    Raises:
        ExamFailed: it requires another argument, so that a case has to be written by hand.
    """
    names = missing(make, given)
    if names:
        raise ExamFailed(f"{make.__name__}: its constructor needs {', '.join(names)}; write a case for it by hand")
    return make(**{name: given[name] for name in _required(make)})


def missing(make: Make, given: Iterable[str]) -> list[str]:
    """Return the required arguments of a constructor that are not among those given."""
    return [name for name in _required(make) if name not in given]


def balls_of(make: Make) -> list[ThreatModel]:
    """Return the threat models, one for each norm, that an attack's constructor takes."""
    taken = []
    for ball in BALLS:
        try:
            default_case(make, threat=ball)
        except UnmovedError:
            continue
        taken.append(ball)
    return taken


def without_case(namespace: ModuleType, cases: Iterable[object], **given: object) -> dict[str, Make]:
    """Return the exports of a namespace, by name, that no case is or consists of; protocols are left out.

    Args:
        namespace: a package such as `unmoved.terms`.
        cases: values that were written by hand; their fields are looked through too.
        given: as for `default_case`; what a function makes of it is looked for by equality.
    """
    parts = [part for case in cases for part in _parts_of(case)]
    exports = {name: getattr(namespace, name) for name in namespace.__all__}
    return {
        name: make
        for name, make in exports.items()
        if not getattr(make, "_is_protocol", False) and not _is_among(make, parts, given)
    }


def _required(make: Make) -> list[str]:
    parameters = inspect.signature(make).parameters.values()
    return [p.name for p in parameters if p.default is p.empty and p.kind is not p.VAR_KEYWORD]


def _is_among(make: Make, parts: list[object], given: dict[str, object]) -> bool:
    if isinstance(make, type):
        return any(type(part) is make for part in parts)
    return not missing(make, given) and default_case(make, **given) in parts


def _parts_of(value: object) -> Iterator[object]:
    """Yield a value and the values in its fields, but nothing of a network's inside."""
    if isinstance(value, tuple | list):
        for part in value:
            yield from _parts_of(part)
    elif not isinstance(value, Tensor):
        yield value
        if not isinstance(value, nn.Module | type) and not inspect.isroutine(value):
            yield from _parts_of(tuple(getattr(value, "__dict__", {}).values()))
