"""Estimate how many images an expensive attack would leave robust, from counts of a sample, with an exact interval.

The design is stratified sampling with two strata (`sampling`): the expensive attack runs on all near survivors of a
cheap one, which add no error, and on a simple random sample of the others, without replacement. The estimate is that of
Horvitz and Thompson (1952); its interval inverts the hypergeometric distribution exactly, so that it holds for no or
few events too (Katz 1953; for strata, Wendell and Schmee 1996, of which this is the case of one random stratum).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, lru_cache

from unmoved.core.errors import UnmovedError, number_field, whole_field

LEVEL = 0.95
# Shares of the error for the two ends of the interval: breaks are rare, so the unknown is how many more there are.
MORE_BROKEN, FEWER_BROKEN = 0.9, 0.1
FIRST_LOOK, LATER_LOOK = 0.7, 0.3  # of the error, for the first and the later looks of `--within`


@dataclass(frozen=True)
class Estimate:
    """Estimate how many of n images a cheap attack and an expensive one together leave robust.

    ``left = survivors - near_broken - far_broken (survivors - near) / far_asked``

    Args:
        n: images in all.
        survivors: those that the cheap attack left robust.
        near, near_broken: number of the nearest survivors, which are all attacked, and how many of them broke.
        far_asked, far_broken: number of the other survivors that were drawn and attacked, and how many of them broke.
        error: the probability with which the interval may miss the truth, over draws.

    Raises:
        UnmovedError: numbers that cannot be counts of such a sample.
    """

    n: int
    survivors: int
    near: int
    near_broken: int
    far_asked: int
    far_broken: int
    error: float = 1 - LEVEL

    def __post_init__(self) -> None:
        whole_field(self, "Estimate.n", at_least=1)
        for name in ("survivors", "near", "near_broken", "far_asked", "far_broken"):
            whole_field(self, f"Estimate.{name}", at_least=0)
        number_field(self, "Estimate.error", above=0, at_most=0.5)
        possible = self.near_broken <= self.near and self.far_broken <= self.far_asked <= self.far
        if not (possible and self.near <= self.survivors <= self.n and (self.far_asked > 0 or self.far == 0)):
            raise UnmovedError(f"Estimate: expected counts of a sample from {self.survivors} survivors, came {self}")

    @property
    def far(self) -> int:
        """Return how many survivors are not among the nearest."""
        return self.survivors - self.near

    @property
    def asked(self) -> int:
        """Return on how many survivors the expensive attack was run."""
        return self.near + self.far_asked

    @property
    def left(self) -> float:
        """Estimate the number of images left robust."""
        return self._left(self.far_broken * self.far / max(self.far_asked, 1))

    @cached_property
    def interval(self) -> tuple[int, int]:
        """Return the least and the most of these n images that may be left robust."""
        return self._interval(self.error)

    @cached_property
    def population(self) -> tuple[float, float]:
        """Return an interval for the robust share of all images of the distribution that the n were drawn from.

        Half of the error goes to the sample of survivors, half to the n images (Clopper and Pearson 1934 at each end of
        the interval for these), so that by Bonferroni's inequality the whole holds with probability 1 - ``error``.
        """
        from scipy.special import betaincinv  # imported here, since scipy takes a moment to load

        (low, high), part = self._interval(self.error / 2), self.error / 4
        least = 0.0 if low == 0 else float(betaincinv(low, self.n - low + 1, part))
        most = 1.0 if high == self.n else float(betaincinv(high + 1, self.n - high, 1 - part))
        return least, most

    @property
    def half_width(self) -> float:
        """Return how far the interval reaches from the estimate at most, as a share of the n images."""
        low, high = self.interval
        return max(self.left - low, high - self.left) / self.n

    def words(self) -> str:
        """Return the estimate as text to quote, in percent of the n images, with the interval rounded outwards."""
        low, high = (100 * count / self.n for count in self.interval)
        ends = f"[{math.floor(10 * low + 1e-6) / 10:.1f}, {math.ceil(10 * high - 1e-6) / 10:.1f}]"
        asked = f"{self.asked:,} of {self.survivors:,} survivors asked"
        return f"AutoAttack, sampled: {100 * self.left / self.n:.1f} {ends}, {asked}"

    def _left(self, far_broken: float) -> float:
        return self.survivors - self.near_broken - far_broken

    def _interval(self, error: float) -> tuple[int, int]:
        least, most = broken_between(
            self.far, self.far_asked, self.far_broken, FEWER_BROKEN * error, MORE_BROKEN * error
        )
        return int(self._left(most)), int(self._left(least))


@lru_cache(maxsize=4096)
def broken_between(size: int, asked: int, broken: int, error_below: float, error_above: float) -> tuple[int, int]:
    """Return the least and the most of ``size`` samples that may break, of which ``broken`` of ``asked`` drawn did.

    With X hypergeometric, the number that break of those drawn if D of all would:
    ``most = max {D: P(X <= broken) > error_above}``, ``least = min {D: P(X >= broken) > error_below}``
    (Katz 1953). The first fails with probability at most ``error_above``, the second with ``error_below``.

    Args:
        size: samples that were drawn from.
        asked: drawn without replacement, at most ``size``.
        broken: of those drawn.
    """
    from scipy.stats import hypergeom  # takes a second to load

    if asked == size:
        return broken, broken

    def last(low: int, high: int, is_possible: Callable[[int], bool]) -> int:
        """Return the last of low..high for which this is true, by bisection: true at first, then false."""
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if is_possible(middle) else (low, middle - 1)
        return low

    seen, unseen = broken, asked - broken
    most = last(seen, size - unseen, lambda count: hypergeom.cdf(seen, size, count, asked) > error_above)
    held = last(unseen, size - seen, lambda count: hypergeom.cdf(unseen, size, count, asked) > error_below)
    return size - held, most


def error_of_look(number: int, error: float = 1 - LEVEL) -> float:
    """Return the share of an error that look number 0, 1, ... at a growing sample may spend.

    ``error 0.7 0.3^number``: by Bonferroni's inequality the interval of the look at which sampling stops holds with
    probability 1 - ``error``, whatever decided to stop there.
    """
    return error * FIRST_LOOK * LATER_LOOK**number
