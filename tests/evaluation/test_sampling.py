"""Who is asked: the nearest, and a draw that is a function of the seed; what either attack broke."""

from __future__ import annotations

import itertools
from math import ceil

import numpy as np
import pandas as pd

from unmoved.evaluation.estimate import Estimate
from unmoved.evaluation.sampling import Survivors, together


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
