"""Add terms with weights; the sum is a term."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from unmoved.core.batch import PerSample
from unmoved.core.errors import UnmovedError
from unmoved.core.phases import Ramp, number, require_ramp
from unmoved.core.preconditions import require_term, values_of
from unmoved.core.protocols import StatefulTerm, Term, couples_samples
from unmoved.core.views import Views


@dataclass(frozen=True, init=False, repr=False)
class Sum:
    """``sum_k w_k term_k``: ``Sum((1, CE("clean")), (6, KL()))``. Sums inside sums are written out.

    A term of weight zero is never computed, so that it cannot change a bit of the rest.

    Raises:
        UnmovedError: no term, or a weight that is not a finite number.
    """

    terms: tuple[tuple[float | Ramp, Term], ...]

    def __init__(self, *terms: tuple[float | Ramp, Term]) -> None:
        if not terms:
            raise UnmovedError("Sum: expected at least one (weight, term) pair, came none")
        flat: list[tuple[float | Ramp, Term]] = []
        for weight, term in terms:
            require_term("Sum", term)
            weight = require_ramp(f"weight of {type(term).__name__}", weight)
            if isinstance(term, Sum) and not isinstance(weight, Ramp) and weight == 1:
                flat.extend(term.terms)
            else:
                flat.append((weight, term))
        object.__setattr__(self, "terms", tuple(flat))

    def __replace__(self, *, terms: tuple[tuple[float | Ramp, Term], ...]) -> Sum:
        return Sum(*terms)

    def __repr__(self) -> str:
        return f"Sum({', '.join(f'({weight!r}, {term!r})' for weight, term in self.terms)})"

    @property
    def couples_samples(self) -> bool:
        """Return whether one of the terms does."""
        return any(couples_samples(term) for _, term in self.terms)

    def parts(self, views: Views) -> dict[str, PerSample]:
        """Compute each term's value (B,), unweighted, under its name; terms of weight zero are left out."""
        return {name: values_of(term, views, "term") for name, (weight, term) in self.named().items() if weight != 0}

    def combine(self, parts: dict[str, PerSample]) -> PerSample:
        """Return the weighted sum of what `parts` returned."""
        total: Tensor | None = None
        for name, (weight, _) in self.named().items():
            if name in parts:
                part = parts[name] if weight == 1 else parts[name] * number(f"weight of {name}", weight)
                total = part if total is None else total + part
        if total is None:
            raise UnmovedError(f"every weight of {self!r} is zero: nothing is left to compute")
        return total

    def named(self) -> dict[str, tuple[float | Ramp, Term]]:
        """Return the pairs under unique names: the class's, numbered from the second on (``ce``, ``ce_2``)."""
        names: dict[str, tuple[float | Ramp, Term]] = {}
        for weight, term in self.terms:
            base = snake_case(type(term).__name__)
            count = 1 + sum(re.fullmatch(rf"{base}(_\d+)?", name) is not None for name in names)
            names[base if count == 1 else f"{base}_{count}"] = (weight, term)
        return names

    def __call__(self, views: Views) -> PerSample:
        return self.combine(self.parts(views))


def as_sum(term: Term) -> Sum:
    """Return a term as a `Sum`."""
    return term if isinstance(term, Sum) else Sum((1.0, term))


def stateful(term: Term | None) -> Iterator[StatefulTerm]:
    """Iterate over the terms inside that learn or remember."""
    if isinstance(term, StatefulTerm):
        yield term
    elif isinstance(term, Sum):
        for _, part in term.terms:
            yield from stateful(part)


def snake_case(name: str) -> str:
    """Write the name of a class as recipes and logs do: ``BoostedCE`` becomes ``boosted_ce``."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", name).lower()
