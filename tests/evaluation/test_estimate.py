"""Estimates from a sample: the interval holds by enumeration, the estimate has no bias over draws."""

from __future__ import annotations

import itertools
from math import comb

import numpy as np
import pytest
from scipy.stats import binom, binomtest, hypergeom

from unmoved.core.errors import UnmovedError
from unmoved.evaluation.estimate import LEVEL, Estimate, broken_between, error_of_look

BELOW, ABOVE = 0.005, 0.045


@pytest.mark.parametrize(("size", "asked"), [(30, 7), (30, 29), (41, 20), (12, 1), (200, 30)])
def test_each_bound_fails_no_more_often_than_it_may(size: int, asked: int) -> None:
    """By enumeration of what can be drawn, for each number that break."""
    bounds = [broken_between(size, asked, k, BELOW, ABOVE) for k in range(asked + 1)]
    least, most = (np.array(side) for side in zip(*bounds, strict=True))
    for broken in range(size + 1):
        chance = hypergeom.pmf(np.arange(asked + 1), size, broken, asked)
        assert chance[most < broken].sum() <= ABOVE + 1e-12
        assert chance[least > broken].sum() <= BELOW + 1e-12


@pytest.mark.parametrize(("size", "asked", "broken"), [(50, 10, 0), (50, 10, 3), (50, 10, 10), (50, 49, 1)])
def test_the_bounds_are_the_outermost_counts_that_are_not_refuted(size: int, asked: int, broken: int) -> None:
    """Binomial coefficients in whole numbers, every count tried."""

    def chance(count: int, draws: range) -> float:
        ways = sum(comb(count, k) * comb(size - count, asked - k) for k in draws)
        return ways / comb(size, asked)

    not_too_many = [d for d in range(size + 1) if chance(d, range(broken + 1)) > ABOVE]
    not_too_few = [d for d in range(size + 1) if chance(d, range(broken, asked + 1)) > BELOW]
    assert broken_between(size, asked, broken, BELOW, ABOVE) == (min(not_too_few), max(not_too_many))


def test_no_more_can_break_than_were_not_asked() -> None:
    assert broken_between(10, 10, 4, BELOW, ABOVE) == (4, 4)
    low, high = broken_between(10, 9, 4, BELOW, ABOVE)
    assert 4 <= low <= high <= 5


def test_the_estimate_is_unbiased_over_all_samples() -> None:
    """Horvitz and Thompson's theorem, by enumeration of every sample of 3 of 7; 2 near ones are all asked."""
    breaks, near_broken = np.array([1, 0, 0, 1, 0, 0, 0]), 1
    lefts = [
        Estimate(12, 9, 2, near_broken, 3, int(breaks[list(drawn)].sum())).left
        for drawn in itertools.combinations(range(7), 3)
    ]
    assert np.mean(lefts) == pytest.approx(9 - near_broken - breaks.sum())


@pytest.mark.parametrize("asked", [9, 24])
def test_the_interval_holds_for_other_images_of_the_distribution(asked: int) -> None:
    """Exactly: n images of which each breaks with one probability, the cheap attack breaks none, some are asked."""
    n = 24
    ends = np.array([Estimate(n, n, 0, 0, asked, k).population for k in range(asked + 1)])
    for share in np.linspace(0.01, 0.99, 50):
        holds = (ends[:, 0] <= share) & (share <= ends[:, 1])
        covered = sum(
            binom.pmf(broken, n, 1 - share) * hypergeom.pmf(np.arange(asked + 1), n, broken, asked)[holds].sum()
            for broken in range(n + 1)
        )
        assert covered >= LEVEL


@pytest.mark.parametrize("left", [0, 1, 17, 24])
def test_of_images_that_were_all_asked_about_the_population_has_clopper_and_pearsons_interval(left: int) -> None:
    """Of half of the error, since the other half would go to the sample."""
    estimate = Estimate(24, 24, 0, 0, 24, 24 - left, error=0.08)
    theirs = binomtest(left, 24).proportion_ci(confidence_level=0.96, method="exact")
    assert estimate.population == pytest.approx((theirs.low, theirs.high), abs=1e-9)


def test_the_half_width_reaches_to_the_further_end() -> None:
    """Few broken leave room for more below, many for fewer above: each side is the longer one at times."""
    longer = set()
    for broken in (1, 5, 20, 35, 39):
        estimate = Estimate(n=200, survivors=160, near=0, near_broken=0, far_asked=40, far_broken=broken)
        sides = estimate.left - estimate.interval[0], estimate.interval[1] - estimate.left
        assert max(sides) == pytest.approx(200 * estimate.half_width)
        longer.add(sides[0] > sides[1])
    assert longer == {True, False}


def test_all_asked_is_the_truth() -> None:
    estimate = Estimate(n=100, survivors=60, near=20, near_broken=3, far_asked=40, far_broken=2)
    assert estimate.interval == (55, 55)
    assert (estimate.left, estimate.half_width, estimate.asked) == (55, 0.0, 60)


def test_the_interval_is_never_left_out_of_the_words_and_is_rounded_outwards() -> None:
    estimate = Estimate(n=10_000, survivors=9_300, near=100, near_broken=10, far_asked=600, far_broken=1)
    low, high = estimate.interval
    words = estimate.words()
    assert words.startswith("AutoAttack, sampled: 92.7 [")
    ends = words[words.index("[") + 1 : words.index("]")].split(", ")
    assert float(ends[0]) <= low / 100
    assert float(ends[1]) >= high / 100
    assert words.endswith("700 of 9,300 survivors asked")


@pytest.mark.parametrize(
    "counts",
    [
        {"near_broken": 11},
        {"far_broken": 6},
        {"far_asked": 51},
        {"survivors": 101},
        {"near": 61},
        {"far_asked": 0, "far_broken": 0},
    ],
)
def test_counts_of_no_sample_are_refused(counts: dict[str, int]) -> None:
    good = {"n": 100, "survivors": 60, "near": 10, "near_broken": 2, "far_asked": 5, "far_broken": 1}
    Estimate(**good)
    with pytest.raises(UnmovedError, match="counts of a sample from"):
        Estimate(**(good | counts))


def test_the_looks_spend_the_error_and_no_more() -> None:
    assert sum(error_of_look(k) for k in range(60)) == pytest.approx(1 - LEVEL)
