"""The one exception that a user can cause, and the words it uses: what was expected, what came, what to do."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable


class UnmovedError(ValueError):
    """Something the user can mend: the message says what was expected, what came and what to do."""


def is_want_of_memory(error: BaseException) -> bool:
    """Whether something failed because there was no memory for it: torch says so in RuntimeErrors of several words."""
    words = str(error).lower()
    said = ("allocate memory", "not enough memory", "out of memory")
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and any(word in words for word in said))


def did_you_mean(name: str, known: Iterable[object]) -> str:
    """``"; did you mean 'awp'?"`` when a known name is near, otherwise the list of known names."""
    names = sorted(map(str, known))
    near = difflib.get_close_matches(name.lower(), names, n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(names) or 'none'}"


def require_number(
    name: str,
    value: float,
    *,
    at_least: float = -math.inf,
    above: float = -math.inf,
    at_most: float = math.inf,
    advice: str = "",
) -> None:
    """Raise `UnmovedError` unless ``value`` is a finite number within the bounds."""
    bounds = [f">= {at_least:g}"] * (at_least > -math.inf)
    bounds += [f"> {above:g}"] * (above > -math.inf)
    bounds += [f"<= {at_most:g}"] * (at_most < math.inf)
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not math.isfinite(value) or not (at_least <= value <= at_most and value > above):
        expected = "a finite number " + " and ".join(bounds)
        raise UnmovedError(f"{name}: expected {expected.strip()}, came {value!r}" + (f"; {advice}" if advice else ""))


def require_choice(name: str, value: object, choices: Iterable[object]) -> None:
    """Raise `UnmovedError` unless ``value`` is one of ``choices``."""
    options = list(choices)
    if value not in options:
        raise UnmovedError(f"{name}: unknown value {value!r}" + did_you_mean(str(value), options))
