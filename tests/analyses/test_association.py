"""AUC, correlations and their intervals, against scipy and against resampling by hand."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
from scipy import stats

from unmoved.analyses import association
from unmoved.analyses.association import (
    auc,
    bootstrap_means,
    fisher,
    interval,
    percentiles,
    rank_correlations,
    spearman,
)
from unmoved.core.errors import UnmovedError


def related(n=60, seed=0, ties=False):
    """x, y with a correlation of about 0.6, and bools that follow y."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=n)
    y = 0.7 * x + 0.7 * rng.normal(size=n)
    if ties:
        x, y = x.round(), y.round()
    return x, y, y + 0.5 * rng.normal(size=n) > 0


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_values_are_scipys(ties, seed):
    x, y, positive = related(seed=seed, ties=ties)
    u = stats.mannwhitneyu(x[positive], x[~positive]).statistic
    assert auc(x, positive).value == pytest.approx(u / (positive.sum() * (~positive).sum()), abs=1e-12)
    assert spearman(x, y).value == pytest.approx(stats.spearmanr(x, y).statistic, abs=1e-12)
    assert fisher(1e6 + 1e-3 * x, y).value == pytest.approx(stats.pearsonr(x, y).statistic, abs=1e-6)
    for measure, scipys in (("Pearson", stats.pearsonr), ("Spearman", stats.spearmanr)):
        assert fisher(x, y, measure).value == pytest.approx(scipys(x, y).statistic, abs=1e-12)


def test_auc_by_hand():
    """Pairs (2, 1), (2, 3), (3, 1), (3, 3): one, none, one, half."""
    assert auc([2, 3, 1, 3], np.array([True, True, False, False])).value == pytest.approx(2.5 / 4)


@pytest.mark.parametrize("ties", [False, True])
def test_every_resample_is_the_measure_of_the_drawn_samples(ties, monkeypatch):
    """The shortcut of ranking counts, against drawing the samples and asking scipy; also where chunks are small."""
    n = 40
    monkeypatch.setattr(association, "CELLS", 7 * n)
    x, y, positive = related(n, ties=ties)
    counts = np.concatenate(list(association._resamples(n, 20, 5)), axis=1).astype(int)
    assert counts.shape == (n, 20)
    assert (counts.sum(axis=0) == n).all()
    assert len(np.unique(counts, axis=1).T) == 20
    estimates = [measure(x, other, bootstraps=20, seed=5) for measure, other in ((auc, positive), (spearman, y))]
    for k in range(20):
        drawn = np.repeat(np.arange(n), counts[:, k])
        a, b, kind = x[drawn], y[drawn], positive[drawn]
        expected = [
            stats.mannwhitneyu(a[kind], a[~kind]).statistic / (kind.sum() * (~kind).sum()),
            stats.spearmanr(a, b).statistic,
        ]
        np.testing.assert_allclose([e.draws[k] for e in estimates], expected, atol=1e-12)
    for estimate in estimates:
        assert (estimate.low, estimate.high) == pytest.approx(tuple(np.percentile(estimate.draws, [2.5, 97.5])))


def test_monotone_transforms_change_no_rank_measure():
    x, y, positive = related()
    for one, other in ((auc(x, positive), auc(np.exp(3 * x), positive)), (spearman(x, y), spearman(x**3, np.exp(y)))):
        assert one.row() == other.row()
    assert auc(-x, positive).value == pytest.approx(1 - auc(x, positive).value)
    assert spearman(-x, y).value == pytest.approx(-spearman(x, y).value)


def test_seeds_decide_and_the_callers_random_state_is_left_alone():
    x, y, _ = related()
    before = np.random.get_state()[1].copy()  # noqa: NPY002 - the global state is what is watched
    assert spearman(x, y, seed=1).row() == spearman(x, y, seed=1).row() != spearman(x, y, seed=2).row()
    assert (np.random.get_state()[1] == before).all()  # noqa: NPY002


def test_without_a_relation_the_auc_is_a_half_and_the_intervals_cover_it():
    """300 permutations: the mean is 0.5 within four standard errors; 95 % intervals miss it about 15 times."""
    rng = np.random.default_rng(3)
    positive = np.arange(50) < 20
    found = [auc(rng.permutation(50), positive, bootstraps=300, seed=k) for k in range(300)]
    values = np.array([e.value for e in found])
    assert abs(values.mean() - 0.5) < 4 * values.std() / 300**0.5
    missed = sum(not e.low <= 0.5 <= e.high for e in found)
    assert 3 <= missed <= 33


def test_intervals_of_spearman_agree_with_fishers_where_both_hold():
    x, y, _ = related(400)
    resampled, analytic = spearman(x, y, bootstraps=2000), fisher(x, y, "Spearman")
    assert (resampled.low, resampled.high) == pytest.approx((analytic.low, analytic.high), abs=0.03)


def test_fishers_intervals():
    x, y, _ = related(20)
    scipys = stats.pearsonr(x, y).confidence_interval(0.95)
    assert (fisher(x, y).low, fisher(x, y).high) == pytest.approx((scipys.low, scipys.high))
    r = fisher(x, y, "Spearman")
    s = math.sqrt((1 + r.value**2 / 2) / 17)
    assert r.low == pytest.approx(math.tanh(math.atanh(r.value) - 1.959964 * s))
    assert r.high == pytest.approx(math.tanh(math.atanh(r.value) + 1.959964 * s))


def test_a_perfect_order_of_four_runs_is_no_certainty():
    """It comes by luck in 1 of 24, so the interval of four holds 0; in 1 of 120 for five, whose interval does not."""
    four, five = (fisher(range(n), np.exp(range(n)), "Spearman") for n in (4, 5))
    assert (four.value, five.value, four.high) == pytest.approx((1, 1, 1))
    assert four.low < 0 < five.low
    falling = fisher(range(4), -np.arange(4), "Spearman")
    assert (falling.value, falling.low, falling.high) == pytest.approx((-1, -1, -four.low))
    assert fisher(range(4), range(4)).low == pytest.approx(1, abs=1e-3)  # on a line: Pearson's r has no error at all


@pytest.mark.parametrize(("n", "value"), [(0, False), (1, False), (2, False), (3, True)])
def test_too_few_runs_have_no_interval_and_a_note(n, value):
    for measure in ("Pearson", "Spearman"):
        found = fisher(np.arange(n), np.arange(n) ** 2, measure)
        assert math.isnan(found.value) != value
        assert math.isnan(found.low)
        assert math.isnan(found.high)
        assert f"came {n}" in found.note


def test_constants_and_few_samples_give_nan_with_a_note_and_no_warning():
    x, y, positive = related()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for found, words in (
            (spearman(np.ones(60), y), "all of x are the same"),
            (spearman(x, np.ones(60)), "all of y are the same"),
            (fisher(np.ones(60), y), "all of x are the same"),
            (auc(np.ones(60), positive), "all of the scores are the same"),
            (auc(x, np.ones(60, dtype=bool)), "positive: 60 of 60"),
            (auc(x, np.zeros(60, dtype=bool)), "positive: 0 of 60"),
            (spearman([], []), "0 samples"),
        ):
            assert np.isnan([found.value, found.low, found.high, *found.draws]).all()
            assert words in found.note
        few = auc([1.0, 2, 3, 4, 5, 6], np.array([False] * 3 + [True] * 3))
        assert few.value == 1  # and its bootstrap interval would be [1, 1]
        assert math.isnan(few.low)
        assert "at least 10" in few.note
        assert math.isnan(spearman(range(9), range(9)).low)
        assert spearman(range(10), range(10)).low == pytest.approx(1)


def test_resamples_where_the_measure_does_not_exist_are_left_out():
    """Two values of which one is rare: many resamples are constant."""
    x = np.array([1.0] + [0.0] * 11)
    found = spearman(x, np.arange(12.0), bootstraps=400)
    assert 0.2 < np.isnan(found.draws).mean() < 0.5
    assert math.isfinite(found.low)
    known = found.draws[~np.isnan(found.draws)]
    assert percentiles(found.draws) == pytest.approx(tuple(np.percentile(known, [2.5, 97.5])))


def test_infinity_ranks_last():
    x, y, positive = related()
    far = np.where(x == x.max(), np.inf, x)
    assert spearman(far, y).row() == spearman(x, y).row()
    assert auc(far, positive).row() == auc(x, positive).row()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: auc([1.0, 2], [0, 1]), "expected positive to be bool"),
        (lambda: auc([1.0, 2], np.array([True])), "expected positive to be bool of shape"),
        (lambda: auc([1.0, math.nan], np.array([True, False])), "came NaN"),
        (lambda: spearman([1.0, 2], [1.0]), "one length, came 2 and 1"),
        (lambda: spearman([[1.0]], [[1.0]]), "one column"),
        (lambda: fisher([1.0, math.inf], [1.0, 2]), "finite numbers, came infinity"),
        (lambda: fisher([1.0, 2], [1.0, 2], "Kendall"), "Kendall"),
        (lambda: spearman(range(20), range(20), bootstraps=0), "bootstraps"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(UnmovedError, match=message):
        call()


# --- the bootstrap over test images: what the binomial says of it, and that all columns share one draw


def test_means_spread_as_the_binomial_says() -> None:
    n, p, draws = 400, 0.3, 4000
    values = (np.arange(n) < p * n)[:, None]
    means = bootstrap_means(values, draws, seed=0)
    error = np.sqrt(p * (1 - p) / n)
    assert abs(means.mean() - p) < 4 * error / np.sqrt(draws)
    assert means.std() == pytest.approx(error, rel=4 / np.sqrt(2 * draws))
    low, high = interval(means)
    assert (low[0], high[0]) == pytest.approx((p - 1.96 * error, p + 1.96 * error), abs=0.2 * error)


def test_all_columns_share_one_draw() -> None:
    right = np.random.default_rng(1).random(50) < 0.5
    means = bootstrap_means(np.stack([right, ~right, right], axis=1), 100, seed=0)
    np.testing.assert_allclose(means[:, 0] + means[:, 1], 1)
    assert (means[:, 0] == means[:, 2]).all()
    assert np.unique(means[:, 0]).size > 5
    np.testing.assert_allclose(means * 50, np.round(means * 50), atol=1e-9)


def test_the_draw_depends_on_the_seed_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(2).random((31, 2))
    state = np.random.get_state
    before = state()[1].copy()
    means = bootstrap_means(values, 20, seed=5)
    assert (before == state()[1]).all()
    assert not (means == bootstrap_means(values, 20, seed=6)).all()
    monkeypatch.setattr(association, "CELLS", 100)  # three draws at a time, the last part of two
    np.testing.assert_allclose(bootstrap_means(values, 20, seed=5), means, rtol=1e-13)


def test_without_a_draw_there_is_no_interval() -> None:
    low, high = interval(bootstrap_means(np.ones((3, 2)), 0, seed=0))
    assert low.shape == high.shape == (2,)
    assert np.isnan([low, high]).all()
    with pytest.raises(UnmovedError, match="at least one image"):
        bootstrap_means(np.ones((0, 2)), 5, seed=0)
    with pytest.raises(UnmovedError, match="bootstraps"):
        bootstrap_means(np.ones((3, 2)), -1, seed=0)


def test_correlations_of_rows_are_scipys() -> None:
    draw = np.random.default_rng(0)
    x, rows = draw.normal(size=7), draw.integers(4, size=(30, 7)).astype(float)
    found = rank_correlations(np.vstack([rows, np.ones(7)]), x)
    expected = [stats.spearmanr(row, x).statistic for row in rows]
    np.testing.assert_allclose(found[:-1], expected, atol=1e-12)
    assert math.isnan(found[-1])


def test_an_interval_asks_for_as_many_samples_as_it_is_told() -> None:
    x, y, _ = related(n=6)
    assert math.isnan(spearman(x, y).low)
    known = spearman(x, y, least=6)
    assert -1 <= known.low <= known.value <= known.high <= 1
