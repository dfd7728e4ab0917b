"""The front against brute force, ownership and areas against theorems, and a paired bootstrap that sees small gaps."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest

from unmoved.analyses.pareto import ALL, RunKey, TradeOff, claims, dominates, front_area, trade_off
from unmoved.core.errors import UnmovedError

Samples = dict[RunKey, tuple[np.ndarray, np.ndarray]]


def answers(clean: float, robust: float, n: int = 200, order: np.ndarray | None = None) -> tuple[np.ndarray, ...]:
    """Right on the first images of an order, so that shares come out exactly."""
    place = np.argsort(np.arange(n) if order is None else order)
    return place < round(clean * n), place < round(robust * n)


def some_runs(seed: int = 0, n: int = 200) -> Samples:
    draw = np.random.default_rng(seed)
    samples: Samples = {}
    for method, clean in (("a", 0.8), ("b", 0.75), ("c", 0.7)):
        for strength in range(3):
            robust = draw.uniform(0.2, 0.5)
            samples[method, float(strength), 0] = answers(clean - 0.05 * strength, robust, n, draw.permutation(n))
    samples["d", math.nan, 0] = answers(0.77, 0.4, n)
    return samples


# --- geometry


def test_domination_and_area_are_those_of_brute_force() -> None:
    draw = np.random.default_rng(0)
    for m in (1, 2, 7):
        clean, robust = draw.integers(0, 11, (2, 20, m)) / 10  # on a grid, with many ties
        found, area = dominates(clean, robust), front_area(clean, robust)
        for b in range(20):
            points = list(zip(clean[b], robust[b], strict=True))
            for i, p in enumerate(points):
                for j, q in enumerate(points):
                    assert found[b, i, j] == (p[0] >= q[0] and p[1] >= q[1] and p != q)
            cells = [(c + 0.05, r + 0.05) for c in np.arange(10) / 10 for r in np.arange(10) / 10]
            covered = sum(any(p[0] > c and p[1] > r for p in points) for c, r in cells)
            assert area[b] == pytest.approx(covered / 100)


def test_the_area_of_a_staircase_by_hand() -> None:
    assert front_area(np.array([0.9]), np.array([0.3])) == pytest.approx(0.27)
    assert front_area(np.array([0.9, 0.6, 0.5]), np.array([0.3, 0.5, 0.4])) == pytest.approx(0.6 * 0.5 + 0.3 * 0.3)


# --- the tables


def test_stretches_tile_the_front_and_their_area_is_that_of_all() -> None:
    for seed in range(5):
        found = trade_off(some_runs(seed), bootstraps=20)
        stretches, points = found.stretches, found.points
        assert stretches["from"].iloc[0] == 0
        assert (stretches["from"].iloc[1:].to_numpy() == stretches["to"].iloc[:-1]).all()
        assert stretches["to"].iloc[-1] == points["clean"].max()
        assert stretches["robust"].is_monotonic_decreasing
        area = found.areas.set_index("method")["area"]
        assert ((stretches["to"] - stretches["from"]) * stretches["robust"]).sum() == pytest.approx(area[ALL])
        assert set(stretches["method"]) == set(points.loc[points["on_front"], "method"])
        assert (area[ALL] >= area).all()


def test_seeds_are_averaged_and_points_are_each_methods_curve() -> None:
    samples = some_runs()
    samples["a", 1.0, 7] = answers(0.95, 0.15)
    found = trade_off(dict(reversed(samples.items())), bootstraps=50)
    assert list(found.points["method"].unique()) == ["a", "d", "c", "b"]  # as they came
    for _, rows in found.points.groupby("method"):
        assert rows["strength"].is_monotonic_increasing or len(rows) == 1
    both = found.points[(found.points["method"] == "a") & (found.points["strength"] == 1)].iloc[0]
    clean = [right.mean() for key, (right, _) in samples.items() if key[:2] == ("a", 1.0)]
    assert (both["seeds"], both["n"], both["clean"]) == (2, 200, pytest.approx(np.mean(clean)))
    assert both["clean_std"] == pytest.approx(np.std(clean, ddof=1))
    assert found.points["clean_std"].notna().sum() == 1
    assert len(found.runs) == len(samples)
    assert (found.points["clean_low"] <= found.points["clean"]).all()
    assert (found.points["clean"] <= found.points["clean_high"]).all()


def test_the_order_of_runs_changes_nothing_but_the_order() -> None:
    one, other = (trade_off(samples, bootstraps=40) for samples in (some_runs(), dict(reversed(some_runs().items()))))
    keys = ["method", "strength"]
    pd.testing.assert_frame_equal(
        one.points.sort_values(keys, ignore_index=True), other.points.sort_values(keys, ignore_index=True)
    )
    pd.testing.assert_frame_equal(
        one.areas.sort_values("method", ignore_index=True), other.areas.sort_values("method", ignore_index=True)
    )
    pd.testing.assert_frame_equal(one.stretches, other.stretches)


def test_the_bootstrap_is_paired() -> None:
    """Right on ten images more: the intervals overlap widely, yet the order holds in every draw."""
    order = np.random.default_rng(3).permutation(200)
    found = trade_off(
        {("good", 1.0, 0): answers(0.8, 0.5, order=order), ("bad", 1.0, 0): answers(0.75, 0.45, order=order)}
    )
    good, bad = (found.points.set_index("method").loc[name] for name in ("good", "bad"))
    assert bad["clean_high"] > good["clean"]
    assert (good["share"], bad["share"]) == (1, 0)
    assert found.stretches[["method", "share"]].to_numpy().tolist() == [["good", 1]]
    dominance = found.dominance.set_index(["method", "by"])["share"]
    assert (dominance["bad", "good"], dominance["good", "bad"]) == (1, 0)


def test_shares_are_the_naive_loops() -> None:
    """Two methods whose images are independent: recompute each draw by hand from the counts it implies."""
    samples = some_runs(4, n=60)
    found = trade_off(samples, bootstraps=30, seed=9)
    draw = np.random.default_rng(9).integers(60, size=(30, 60))
    keys = list(samples)
    fronts, owned = [], []
    for images in draw:
        points = [tuple(right[images].mean() for right in samples[key]) for key in keys]
        fronts.append([not any(p[0] >= q[0] and p[1] >= q[1] and p != q for p in points) for q in points])
        for _, stretch in found.stretches.iterrows():
            own = points[keys.index(next(k for k in keys if k[0] == stretch["method"] and k[1] == stretch["strength"]))]
            best = {k[0]: -1.0 for k in keys}
            for key, point in zip(keys, points, strict=True):
                if point[0] >= own[0]:
                    best[key[0]] = max(best[key[0]], point[1])
            owned.append(best[stretch["method"]] == max(best.values()))
    np.testing.assert_allclose(found.points["share"], np.mean(fronts, axis=0))
    np.testing.assert_allclose(found.stretches["share"], np.reshape(owned, (30, -1)).mean(axis=0))
    methods = np.array([key[0] for key in keys])
    for name in "abcd":
        share = np.mean(np.array(fronts)[:, methods == name].any(axis=1))
        assert found.areas.set_index("method").loc[name, "share"] == pytest.approx(share)


def test_equal_points_share_a_stretch() -> None:
    order = np.random.default_rng(0).permutation(200)
    samples: Samples = {("a", 1.0, s): answers(0.7, 0.4, order=order) for s in range(3)}  # thirds: rounding may bite
    samples |= {("b", 1.0, s): answers(0.7, 0.4, order=order) for s in range(2)}
    found = trade_off(samples, bootstraps=200)
    assert found.stretches["method"].tolist() == ["a", "b"]
    assert (found.stretches[["from", "to"]] == [0, 0.7]).all(axis=None)
    assert (found.stretches["share"] == 1).all()
    assert (found.points["share"] == 1).all()
    assert (found.areas["gain"].iloc[1:] == 0).all()


def test_what_a_method_adds_to_the_area() -> None:
    found = trade_off({("a", 0.0, 0): answers(0.9, 0.3), ("b", 0.0, 0): answers(0.6, 0.5)}, bootstraps=100)
    areas = found.areas.set_index("method")
    assert areas["area"].to_dict() == pytest.approx({ALL: 0.39, "a": 0.27, "b": 0.30})
    assert areas["gain"].to_dict() == pytest.approx({ALL: 0.39, "a": 0.09, "b": 0.12})
    assert (areas["low"] < areas["area"]).all()
    assert (areas["area"] < areas["high"]).all()
    assert (areas["gain_low"] < areas["gain"]).all()


# --- the verdict


def judged(found: TradeOff) -> dict[str, tuple[str, str]]:
    rows = claims(found.areas, found.dominance)
    return {row.method: (row.verdict, row.by) for row in rows.itertuples()}


def test_the_verdict_names_front_dominated_and_by_whom() -> None:
    samples: Samples = {
        ("left", 1.0, 0): answers(0.6, 0.5),
        ("right", 1.0, 0): answers(0.9, 0.2),
        ("under left", 1.0, 0): answers(0.5, 0.4),
        ("under that", 1.0, 0): answers(0.4, 0.3),
        ("under both", 1.0, 0): answers(0.5, 0.45),
        ("under both", 2.0, 0): answers(0.8, 0.1),
    }
    found = trade_off(samples, bootstraps=300)
    assert judged(found) == {
        "left": ("on the front", ""),
        "right": ("on the front", ""),
        "under left": ("dominated", "left"),
        "under that": ("dominated", "left"),  # not by what is dominated itself
        "under both": ("dominated", "left, right"),
    }
    words = claims(found.areas, found.dominance).set_index("method")["words"]
    assert words["left"] == "left is on the front: it has a point on the front in all of the bootstraps."
    assert words["under left"].startswith("under left is dominated by left: ")
    assert "dominated together by left, right: it has a point on the front in none" in words["under both"]


def test_a_toss_up_is_undecided() -> None:
    draw = np.random.default_rng(5)
    samples: Samples = {}
    for name in ("a", "b"):
        order = draw.permutation(200)
        samples[name, 1.0, 0] = answers(0.7, 0.7, order=order)  # clean = robust, so the better one dominates
    found = trade_off(samples, bootstraps=500)
    assert {word for word, _ in judged(found).values()} == {"undecided"}
    assert found.areas["share"].iloc[1:].between(0.3, 0.7).all()


def test_the_limits_of_the_verdict() -> None:
    pairs = pd.DataFrame({"method": ["b"], "by": ["a"], "share": [0.96], "any_share": [0.96]})
    for share, word in ((0.95, "on the front"), (0.94, "undecided"), (0.06, "undecided"), (0.04, "dominated")):
        areas = pd.DataFrame({"method": [ALL, "a", "b"], "share": [1, 1, share]})
        assert claims(areas, pairs)["verdict"].tolist() == ["on the front", word]
    with pytest.raises(UnmovedError, match="none of any_share"):
        claims(areas, pairs.drop(columns="any_share"))


# --- bad input


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        ({}, "at least one run"),
        ({("a", 1.0, 0): (np.ones(3), np.ones(3))}, "two bool arrays"),
        ({("a", 1.0, 0): (np.ones(3, bool), np.ones(2, bool))}, "two bool arrays"),
        ({("a", 1.0, 0): (np.ones(0, bool), np.ones(0, bool))}, "at least one image"),
        ({("a", 1.0, 0): (np.array([True, False]), np.array([True, True]))}, "1 images are robust yet wrong"),
        ({("a", 1.0, 0): answers(1, 1, 4), ("b", 1.0, 0): answers(1, 1, 5)}, r"the same images, .* on \[4, 5\]"),
        ({(ALL, 1.0, 0): answers(1, 1)}, "other than 'all methods'"),
        ({("a", math.nan, 0): answers(1, 1), ("a", float("nan"), 0): answers(1, 1)}, "stands twice"),
    ],
)
def test_bad_samples(samples: Samples, message: str) -> None:
    with pytest.raises(UnmovedError, match=message):
        trade_off(samples)
