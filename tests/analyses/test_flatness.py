"""What a sweep says: intervals by hand, and verdicts by the rule."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
import torch
from helpers.function_risk import FunctionRisk
from scipy import stats

from unmoved.analyses.corruption import expected_ratio, sweep
from unmoved.analyses.flatness import claims, indicators, summarise
from unmoved.core.errors import UnmovedError


def bowl(seed=0, curvature=1.0, slope=0.5, k=12):
    w = torch.randn(k, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).requires_grad_()
    start = w.detach().clone()
    g = slope * torch.ones(k, dtype=torch.float64)
    return FunctionRisk(lambda: 1 + g @ (w - start) + curvature * ((w - start) ** 2).sum() / 2, [w])


def test_means_and_their_intervals_are_those_of_a_t_test():
    table = sweep(bowl(), [0.1, 0.3], draws=7, steps=3)
    summary = summarise(table)
    for (kind, eps), rows in table.groupby(["kind", "eps_relative"]):
        for measure in ("loss", "accuracy"):
            chosen = (summary["kind"] == kind) & (summary["eps_relative"] == eps) & (summary["measure"] == measure)
            (row,) = summary[chosen].to_dict("records")
            changes = rows[f"{measure}_change"]
            assert row["draws"] == len(rows)
            if measure == "loss":
                assert row["mean"] == pytest.approx(changes.mean())
            if measure == "loss" and kind == "random":
                interval = stats.ttest_1samp(changes, 0).confidence_interval(0.95)
                assert (row["low"], row["high"]) == pytest.approx((interval.low, interval.high))
                cleared = changes - rows["linear_change"]
                assert row["controlled"] == pytest.approx(cleared.mean())
                assert row["first_order"] == pytest.approx(rows["first_order"].mean())
                assert row["first_order_expected"] == expected_ratio(12)
                (worst,) = table[table["draw"].isna() & (table["eps_relative"] == eps)]["loss_change"]
                assert row["observed_ratio"] == pytest.approx(changes.abs().mean() / worst)
            else:
                assert math.isnan(row["low"])
                assert math.isnan(row["high"])
                assert math.isnan(row["controlled"])
                assert math.isnan(row["observed_ratio"])


def test_a_bowl_has_the_same_curvature_in_every_direction():
    """H = cI: DL(r) - r.g is c eps^2 / 2 for every draw, so the controlled interval has no width."""
    summary = summarise(sweep(bowl(curvature=3.0), [0.2], relative=False, draws=5))
    (row,) = summary.query("kind == 'random' and measure == 'loss'").to_dict("records")
    assert row["controlled"] == pytest.approx(3 * 0.2**2 / 2)
    assert row["controlled_high"] - row["controlled_low"] < 1e-12
    assert row["high"] - row["low"] > 1e-3


def test_sweeps_may_stand_one_below_the_other():
    one, two = (sweep(bowl(seed), [0.1], draws=4, steps=2) for seed in (0, 1))
    apart = [summarise(t) for t in (one, two)]
    both = summarise(pd.concat([one.assign(run="a", view=None), two.assign(run="b", view=None)]))
    for name, alone in zip("ab", apart, strict=True):
        rows = both[both["run"] == name].drop(columns=["run", "view"]).reset_index(drop=True)
        pd.testing.assert_frame_equal(rows[alone.columns], alone)


def test_where_no_ratio_is_known_there_is_none():
    flat = sweep(bowl(slope=0.0, curvature=-1.0), [0.1], draws=3)
    assert summarise(flat)["observed_ratio"].isna().all()  # I_max = 0
    assert summarise(flat)["first_order"].isna().all()  # no gradient
    assert summarise(sweep(bowl(), [0.1], draws=3, steps=0))["observed_ratio"].isna().all()
    for settings in ({"p": math.inf}, {"n": 2}):
        summary = summarise(sweep(bowl(), [0.1], draws=3, **settings))
        assert summary["first_order_expected"].isna().all()
        assert summary["observed_ratio"].notna().sum() == 1
    assert summarise(sweep(bowl(), [0.1], draws=1))["low"].isna().all()


def test_indicators_at_one_eps():
    tables = [
        sweep(bowl(seed, curvature=c), [0.1, 0.2], draws=3).assign(run=f"r{seed}") for seed, c in ((0, 1), (1, 2))
    ]
    summary = summarise(pd.concat(tables))
    found = indicators(summary, 0.2).set_index("run")
    assert list(found.index) == ["r0", "r1"]
    for name, c in (("r0", 1), ("r1", 2)):
        eps = found["eps"][name]
        assert found["i_ave"][name] == pytest.approx(c * eps**2 / 2)
        assert found["i_max"][name] == pytest.approx(eps * 0.5 * 12**0.5 + c * eps**2 / 2)
    with pytest.raises(UnmovedError, match=r"at eps_relative 0.3, came \[\]; there are scopes \['global'\]"):
        indicators(summary, 0.3)
    with pytest.raises(UnmovedError, match="scope 'x'"):
        indicators(summary, 0.2, scope="x")


# --- the verdict


def runs(count, robust=-1.0, clean=0.0, noise=0.1, seed=0):
    rng = np.random.default_rng(seed)
    flat = rng.normal(size=count)
    return pd.DataFrame(
        {
            "name": [f"run {k}" for k in range(count)],
            "i_max": np.exp(flat),
            "i_ave": np.exp(flat + noise * rng.normal(size=count)),
            "robust_accuracy": 0.5 + 0.05 * (robust * flat + noise * rng.normal(size=count)),
            "clean_accuracy": 0.8 + 0.05 * (clean * flat + noise * rng.normal(size=count)),
        }
    )


def test_words_follow_from_the_intervals():
    table = claims(runs(15, robust=-1, clean=1)).set_index(["indicator", "accuracy"])
    assert table.loc[("I_max", "robust"), "verdict"] == "confirmed"
    assert table.loc[("I_ave", "robust"), "verdict"] == "confirmed"
    assert table.loc[("I_max", "clean"), "verdict"] == "refuted"
    assert set(claims(runs(15, robust=0, clean=0, noise=1.0, seed=3))["verdict"]) == {"undecided"}
    for _, row in table.iterrows():
        assert row["low"] <= row["rho"] <= row["high"]
        assert row["verdict"] in row["sentence"]
        assert f"{row['rho']:+.2f}" in row["sentence"]
        assert "15 runs" in row["sentence"]
    assert claims(runs(15)).equals(claims(runs(15)))


def test_rho_is_spearmans():
    table = runs(12, noise=0.7)
    found = claims(table).set_index(["indicator", "accuracy"])["rho"]
    for indicator, first in (("I_max", "i_max"), ("I_ave", "i_ave")):
        for accuracy in ("robust", "clean"):
            expected = stats.spearmanr(table[first], table[f"{accuracy}_accuracy"]).statistic
            assert found[indicator, accuracy] == pytest.approx(expected)
    logs = table.assign(i_max=np.log(table["i_max"]))
    assert claims(logs)["rho"].equals(claims(table)["rho"])


def test_few_runs_and_constant_runs_decide_nothing():
    """Five runs in perfect order would have a bootstrap interval of [-1, -1]."""
    few = claims(runs(5, noise=0.0))
    assert few["rho"].iloc[0] == -1
    assert set(few["verdict"]) == {"undecided"}
    assert few["sentence"].str.contains("fewer than 6 decide nothing").iloc[0]
    assert claims(runs(6, noise=0.0))["verdict"].iloc[0] == "confirmed"
    constant = claims(runs(8).assign(robust_accuracy=0.5)).query("accuracy == 'robust'")
    assert constant["rho"].isna().all()
    assert set(constant["verdict"]) == {"undecided"}
    assert constant["sentence"].str.contains("does not vary").all()


@pytest.mark.parametrize("count", [6, 10])
def test_runs_without_a_relation_are_seldom_decided(count):
    words = pd.concat([claims(runs(count, 0, 0, 1.0, seed), resamples=200, seed=seed) for seed in range(80)])
    rate = (words.query("indicator == 'I_max'")["verdict"] != "undecided").mean()
    assert rate < 0.05 + 3 * math.sqrt(0.05 * 0.95 / 160)


def test_bad_tables():
    with pytest.raises(UnmovedError, match=r"summarise: expected a table with .* came none of draw"):
        summarise(pd.DataFrame({"kind": ["random"]}))
    with pytest.raises(UnmovedError, match="came none of robust_accuracy"):
        claims(runs(6).drop(columns="robust_accuracy"))
    with pytest.raises(UnmovedError, match="came no row"):
        claims(runs(6).iloc[:0])
    with pytest.raises(UnmovedError, match="finite numbers in 'i_max'"):
        claims(runs(6).assign(i_max=math.nan))
    with pytest.raises(UnmovedError, match="resamples"):
        claims(runs(6), resamples=10)
