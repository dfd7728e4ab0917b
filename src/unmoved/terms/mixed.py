"""Refuse terms that cannot be computed for an image mixed from two as the mean of the values for its two labels."""

from __future__ import annotations

from unmoved.core.errors import UnmovedError
from unmoved.core.protocols import Term, couples_samples
from unmoved.terms.sum import Sum, stateful


def require_mixable(term: Term) -> None:
    """Raise `UnmovedError` if a term, or one inside, remembers something of each label or couples samples."""
    if isinstance(term, Sum):
        for _, part in term.terms:
            require_mixable(part)
    elif next(stateful(term), None) is not None or couples_samples(term):
        what = "couples the samples of a batch" if couples_samples(term) else "remembers what it saw of each label"
        raise UnmovedError(
            f"images mixed of two (CutMix): expected terms of one sample and one label, came {term!r:.80}, which "
            f"{what}; train by another term, or leave cutmix out of the augmentation"
        )
