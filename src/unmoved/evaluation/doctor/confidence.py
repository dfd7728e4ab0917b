"""Bound shares by exact binomial limits, so that no grade rests on too few samples."""

from __future__ import annotations

import scipy.special

from unmoved.evaluation.doctor.finding import DO_NOT_BELIEVE, LOOK_CLOSER

LEVEL = 0.95  # of each one-sided bound


def lower(count: float, n: float) -> float:
    """Return the lower bound of a share at `LEVEL`, one-sided (Clopper and Pearson 1934).

    The p at which Binomial(n, p) reaches ``count`` or more with probability 1 - LEVEL. ``count`` and ``n`` may be
    fractions, since one sample of a costly attack can stand for several.
    """
    return 0.0 if count <= 0 else float(scipy.special.betaincinv(count, n - count + 1, 1 - LEVEL))


def upper(count: float, n: float) -> float:
    """Return the upper bound of a share at `LEVEL`, one-sided; 1 for no samples."""
    return 1.0 if count >= n else float(scipy.special.betaincinv(count + 1, n - count, LEVEL))


def by_luck(count: int, n: int, share: float) -> float:
    """Return the probability of ``count`` or more successes in ``n`` trials of probability ``share``."""
    return 1.0 if count <= 0 else float(scipy.special.bdtrc(count - 1, n, share))


def grade(count: float, n: float, closer: float, wrong: float) -> str | None:
    """Grade the share ``count / n`` against two thresholds, by its lower bound; None below both."""
    share = lower(count, n)
    return DO_NOT_BELIEVE if share >= wrong else LOOK_CLOSER if share >= closer else None


def grade_of_gain(gained: int, lost: int, n: int, closer: float, wrong: float, tries: int) -> str | None:
    """Grade the net gain of a change to all samples: ``gained`` of ``n`` become right and ``lost`` become wrong.

    The net gain is graded as a share if the sign test finds it significant at level (1 - LEVEL) / ``tries``, where
    ``tries`` is the number of changes that were tried (Bonferroni).
    """
    if by_luck(gained, gained + lost, 0.5) > (1 - LEVEL) / tries:
        return None
    return grade(gained - lost, n, closer, wrong)
