"""Sampled verdicts: the interval holds by enumeration, the estimate has no bias, the draw is a function of the seed."""

from __future__ import annotations

import itertools
from math import ceil, comb

import numpy as np
import pandas as pd
import pytest
from scipy.stats import binom, hypergeom

from unmoved.core.errors import UnmovedError
from unmoved.evaluation.sampling import LEVEL, Estimate, Survivors, broken_between, error_of_look, together

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


# --- the draw


def survivors(count: int = 400, seed: int = 0) -> Survivors:
    draw = np.random.default_rng(1)
    distance = np.where(draw.random(count) < 0.3, np.inf, draw.random(count))
    return Survivors(np.arange(count) * 2, draw.permutation(10 * count)[:count], distance, seed)


def test_the_draw_depends_on_the_seed_and_not_on_the_order() -> None:
    ours = survivors()
    turn = np.random.default_rng(2).permutation(len(ours))
    theirs = Survivors(ours.position[turn], ours.index[turn], ours.distance[turn], ours.seed)
    for one, other in zip(ours.design(60), theirs.design(60), strict=True):
        assert one.tolist() == other.tolist()
    assert set(ours.design(60).drawn) != set(survivors(seed=1).design(60).drawn)
    assert ours.design(60).near.tolist() == survivors(seed=1).design(60).near.tolist()


def test_near_are_the_nearest_and_each_is_asked_once() -> None:
    ours = survivors()
    near, drawn = ours.design(100)
    assert len(near) + len(drawn) == len({*near, *drawn}) == 100
    far = np.setdiff1d(ours.position, near)
    at = dict(zip(ours.position.tolist(), ours.distance.tolist(), strict=True))
    assert max(at[k] for k in near) <= min(at[k] for k in far)


def test_a_larger_sample_holds_the_smaller() -> None:
    ours = survivors()
    asked = [set(np.concatenate(ours.design(size)).tolist()) for size in (3, 40, 41, 130, 399, 400)]
    for smaller, larger in itertools.pairwise(asked):
        assert smaller < larger


def test_where_no_boundary_was_found_nobody_is_near() -> None:
    lost = Survivors(np.arange(50), np.arange(50), np.full(50, np.inf))
    near, drawn = lost.design(20)
    assert (len(near), len(drawn)) == (0, 20)


def test_every_far_survivor_is_as_likely_to_be_drawn() -> None:
    """2,000 seeds: each count lies within 4.5 deviations of its binomial mean."""
    counts = np.zeros(40)
    for seed in range(2000):
        counts[Survivors(np.arange(40), np.arange(40) * 7, np.full(40, np.inf), seed).design(10).drawn] += 1
    assert abs(counts - 500).max() < 4.5 * np.sqrt(2000 * 0.25 * 0.75)


def test_the_smallest_sample_reaches_and_one_less_does_not() -> None:
    lost = Survivors(np.arange(900), np.arange(900), np.full(900, np.inf))
    for broken in (0, 2):
        size = lost.smallest(0.01, 1000, broken, 0.05)
        reach = [Estimate(1000, 900, 0, 0, asked, broken).half_width for asked in (size, size - 1)]
        assert reach[0] <= 0.01 < reach[1]
    # That a single one breaks is refuted, if it would have been drawn with probability 1 - 0.9 0.05.
    assert lost.smallest(1e-9, 1000, 0, 0.05) == ceil(900 * (1 - 0.045))


def test_the_looks_spend_the_error_and_no_more() -> None:
    assert sum(error_of_look(k) for k in range(60)) == pytest.approx(1 - LEVEL)


def test_together_is_what_either_broke() -> None:
    rows = {"label": 1, "clean_prediction": 1, "eps": 0.1, "norm": "linf", "distance": 0.0}
    cheap = pd.DataFrame({"index": [3, 5, 8], "attack": "quick", "success": [True, False, False], **rows})
    cheap = cheap.assign(adversarial_prediction=[2, 1, 1], by=["near", "none", "none"])
    asked = cheap.iloc[1:].assign(attack="aa", success=[True, False], by=["square", "none"])
    asked["adversarial_prediction"] = [7, 1]
    both = together(cheap, asked)
    assert both[both["attack"] == "quick"].reset_index(drop=True).equals(cheap)
    second = both[both["attack"] == "aa"].set_index("index")
    assert second["by"].to_dict() == {3: "near", 5: "square", 8: "none"}
    assert second["success"].to_dict() == {3: True, 5: True, 8: False}
    assert second["adversarial_prediction"].to_dict() == {3: 2, 5: 7, 8: 1}
