"""Define `UnmovedError`, raised for every mistake a user can make, and the checks of settings that raise it."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterable
from decimal import Decimal
from numbers import Integral, Real
from typing import TYPE_CHECKING, TypedDict, Unpack

if TYPE_CHECKING:
    import pandas as pd


class UnmovedError(ValueError):
    """Report a mistake that the user can correct: the message says what was expected, what came and what to do."""


def is_want_of_memory(error: BaseException) -> bool:
    """Return whether an error means that memory ran out, which torch reports as RuntimeErrors with several texts."""
    text = str(error).lower()
    signs = ("allocate memory", "not enough memory", "out of memory")
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and any(sign in text for sign in signs))


def did_you_mean(name: str, known: Iterable[object]) -> str:
    """Return ``"; did you mean 'awp'?"`` when a known name is near, otherwise the list of known names."""
    names = sorted(map(str, known))
    near = difflib.get_close_matches(name.lower(), names, n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(names) or 'none'}"


def several(names: Iterable[str]) -> str:
    """List names as ``'a', 'b', 'c' and 5 more``."""
    first, *rest = [repr(name) for name in names]
    shown = ", ".join([first, *rest[:2]])
    return f"{shown} and {len(rest) - 2} more" if len(rest) > 2 else shown


def require_columns(table: pd.DataFrame, columns: Iterable[str], where: str, *, may_be_empty: bool = False) -> None:
    """Raise `UnmovedError` unless the table has these columns and, unless it may be empty, at least one row."""
    columns = list(columns)
    missing = [name for name in columns if name not in table.columns]
    if missing or (table.empty and not may_be_empty):
        came = f"none of {', '.join(missing)}" if missing else "no row"
        raise UnmovedError(f"{where}: expected a table with {', '.join(columns)}, came {came}")


class WholeBounds(TypedDict, total=False):
    """Hold the keyword arguments of `require_whole`."""

    at_least: float
    at_most: float
    advice: str


class Bounds(WholeBounds, total=False):
    """Hold the keyword arguments of `require_number`."""

    above: float


def require_number(
    name: str,
    value: object,
    *,
    at_least: float = -math.inf,
    above: float = -math.inf,
    at_most: float = math.inf,
    advice: str = "",
) -> float:
    """Return ``value`` as a Python number; any real number is accepted, such as numpy's or a tensor of one element.

    Raises:
        UnmovedError: it is not a finite number within the bounds.
    """
    number = _plain(value)
    if number is None or not (at_least <= number <= at_most and number > above):
        raise _refused(name, "a finite number", value, at_least, above, at_most, advice)
    return number


def require_whole(
    name: str, value: object, *, at_least: float = -math.inf, at_most: float = math.inf, advice: str = ""
) -> int:
    """Return ``value`` as an int; 10.0 becomes 10, since divisions such as eps / step_size give floats.

    Raises:
        UnmovedError: it is not a whole number within the bounds.
    """
    number = _plain(value)
    if number is None or number != int(number) or not at_least <= number <= at_most:
        near = number is not None and number != int(number)
        raise _refused(name, "a whole number", value, at_least, -math.inf, at_most, advice or "round it" * near)
    return int(number)


def require_seed(name: str, value: object) -> int:
    """Apply `require_whole` to a seed: a whole number that fits into a signed 64-bit integer."""
    return require_whole(name, value, at_least=-(2**63), at_most=2**63 - 1)


def require_flag(name: str, value: object) -> bool:
    """Return ``value`` as True or False.

    Raises:
        UnmovedError: it is neither, for example the text "no", which Python counts as true.
    """
    value = _scalar(value)
    if not isinstance(value, bool):
        raise UnmovedError(f"{name}: expected true or false, came {value!r:.80}")
    return value


def number_field(owner: object, name: str, **bounds: Unpack[Bounds]) -> None:
    """Apply `require_number` to a field of a frozen value and keep the plain number, so that ``repr`` rebuilds it.

    Args:
        owner: the value that is being made.
        name: what the message says, such as ``"optimizer.lr"``; its last part is the name of the field.
        bounds: as in `require_number`.
    """
    keep_field(owner, name, lambda name, value: require_number(name, value, **bounds))


def whole_field(owner: object, name: str, **bounds: Unpack[WholeBounds]) -> None:
    """Apply `require_whole` to a field of a frozen value, as `number_field` does."""
    keep_field(owner, name, lambda name, value: require_whole(name, value, **bounds))


def flag_field(owner: object, name: str) -> None:
    """Apply `require_flag` to a field of a frozen value, as `number_field` does."""
    keep_field(owner, name, require_flag)


def keep_field(owner: object, name: str, require: Callable[[str, object], object]) -> None:
    """Replace a frozen field by ``require(name, value)``; ``name`` as in `number_field`.

    Call it from ``__post_init__`` only: from then on the value is frozen as always.
    """
    field = name.rpartition(".")[2]
    object.__setattr__(owner, field, require(name, getattr(owner, field)))


def _scalar(value: object) -> object:
    """Convert numpy's numbers, and tensors of one element, to Python's; return anything else as it is."""
    return value.item() if getattr(value, "shape", None) == () and hasattr(value, "item") else value


def _plain(value: object) -> float | None:
    """Convert any kind of real number to int or float; None if it is no real number or not finite."""
    value = _scalar(value)
    if isinstance(value, bool) or not isinstance(value, Real | Decimal):
        return None
    try:
        number = float(value)
    except (OverflowError, ValueError):  # too large, or Decimal's signalling NaN
        return None
    return (int(value) if isinstance(value, Integral) else number) if math.isfinite(number) else None


def _refused(
    name: str, what: str, value: object, at_least: float, above: float, at_most: float, advice: str
) -> UnmovedError:
    bounds = [f">= {at_least:g}"] * (at_least > -math.inf)
    bounds += [f"> {above:g}"] * (above > -math.inf)
    bounds += [f"<= {at_most:g}"] * (at_most < math.inf)
    if isinstance(value, str):
        advice = advice or "leave out the quotes"
    came = f"one of {value.bit_length()} bits" if type(value) is int and value.bit_length() > 128 else f"{value!r:.80}"
    expected = f"{what} {' and '.join(bounds)}".strip()
    return UnmovedError(f"{name}: expected {expected}, came {came}" + (f"; {advice}" if advice else ""))


def require_choice(name: str, value: object, choices: Iterable[object]) -> None:
    """Raise `UnmovedError` unless ``value`` is one of ``choices``."""
    options = list(choices)
    if value not in options:
        is_quoted = isinstance(value, str) and value in map(str, options)
        advice = "; leave out the quotes" if is_quoted else did_you_mean(str(value), options)
        raise UnmovedError(f"{name}: unknown value {value!r:.80}{advice}")
