"""Describe how a training method changes over the epochs: phases, and numbers that ramp linearly within one."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar, Unpack

from torch import nn

from unmoved.core.errors import Bounds, UnmovedError, keep_field, number_field, require_number, require_whole
from unmoved.core.protocols import Method

Value = TypeVar("Value")


@dataclass(frozen=True)
class Ramp:
    """A number that goes linearly from ``start`` to ``stop`` over the first share ``over`` of its phase.

    value(s) = start + (stop - start) * min(s / over, 1), with s in [0, 1] the share of the phase that is done.

    Raises:
        UnmovedError: an end that is not a finite number, or ``over`` outside (0, 1].
    """

    start: float
    stop: float
    over: float = 1.0

    def __post_init__(self) -> None:
        number_field(self, "ramp.start")
        number_field(self, "ramp.stop")
        number_field(self, "ramp.over", above=0, at_most=1, advice="it is a share of the phase")

    def at(self, share: float) -> float:
        return self.start + (self.stop - self.start) * min(share / self.over, 1.0)


def require_ramp(name: str, value: object, **bounds: Unpack[Bounds]) -> float | Ramp:
    """Apply `require_number` to a number, or to both ends of a ramp."""
    if not isinstance(value, Ramp):
        return require_number(name, value, **bounds)
    for end in (value.start, value.stop):
        require_number(name, end, **bounds)
    return value


def ramp_field(owner: object, name: str, **bounds: Unpack[Bounds]) -> None:
    """Apply `number_field` to a field that may ramp."""
    keep_field(owner, name, lambda name, value: require_ramp(name, value, **bounds))


def number(name: str, value: float | Ramp) -> float:
    """Return the number in a field that may ramp.

    Raises:
        UnmovedError: it is a `Ramp` that was not resolved.
    """
    if isinstance(value, Ramp):
        raise UnmovedError(f"{name} is a Ramp: only the training loop resolves ramps; give a number here")
    return value


def resolve(value: Value, share: float) -> Value:
    """Replace each `Ramp` inside a dataclass by its number; return the same object if nothing ramps."""
    if not dataclasses.is_dataclass(value) or isinstance(value, type | nn.Module):
        return value
    old = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
    changed = {name: new for name in old if (new := _number_or_part(old[name], share)) is not old[name]}
    rebuild: Callable[..., Value] = getattr(type(value), "__replace__", dataclasses.replace)
    return rebuild(value, **changed) if changed else value


def _number_or_part(value: object, share: float) -> object:
    if isinstance(value, Ramp):
        return value.at(share)
    if isinstance(value, tuple):
        parts = tuple(_number_or_part(part, share) for part in value)
        return parts if any(new is not old for new, old in zip(parts, value, strict=True)) else value
    return resolve(value, share)


@dataclass(frozen=True)
class Phases:
    """Hold a `Method` for each range of epochs: ``Phases((0, warm_up), (10, method))``.

    Raises:
        UnmovedError: no phase, a first phase that does not start at epoch 0, or starts that do not increase.
    """

    phases: tuple[tuple[int, Method], ...]

    def __init__(self, *phases: tuple[int, Method]) -> None:
        for phase in phases:
            if not isinstance(phase, tuple | list) or len(phase) != 2 or not isinstance(phase[1], Method):
                raise UnmovedError(f"phases: expected pairs (from_epoch, Method(...)), came {phase!r:.80}")
        phases = tuple((require_whole("phases: from_epoch", start), method) for start, method in phases)
        object.__setattr__(self, "phases", phases)
        starts = [start for start, _ in phases]
        if not starts or starts[0] != 0 or any(b <= a for a, b in zip(starts, starts[1:], strict=False)):
            raise UnmovedError(f"phases: expected starts 0 < ... increasing, came {starts}")

    def __repr__(self) -> str:
        return f"Phases({', '.join(map(repr, self.phases))})"

    @staticmethod
    def of(method: Method | Phases | Sequence[tuple[int, Method]]) -> Phases:
        if isinstance(method, Phases):
            return method
        if isinstance(method, Method):
            return Phases((0, method))
        if not isinstance(method, Sequence):
            raise UnmovedError(f"method: expected Method(attack, objective, defense), came {type(method).__name__}")
        return Phases(*method)

    def at(self, epoch: float, epochs: int) -> Method:
        """Return the method at a fractional epoch of a training of ``epochs`` epochs, its ramps resolved."""
        current = max(k for k, (start, _) in enumerate(self.phases) if start <= epoch)
        start, method = self.phases[current]
        end = self.phases[current + 1][0] if current + 1 < len(self.phases) else epochs
        return resolve(method, (epoch - start) / max(end - start, 1))
