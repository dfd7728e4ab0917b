"""The bootstrap over test images: what the binomial says of it, and that all columns share one draw."""

from __future__ import annotations

import numpy as np
import pytest

from unmoved.analyses import resampling
from unmoved.analyses.resampling import bootstrap_means, interval
from unmoved.core.errors import UnmovedError


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
    monkeypatch.setattr(resampling, "AT_ONCE", 100)  # three draws at a time, the last part of two
    np.testing.assert_allclose(bootstrap_means(values, 20, seed=5), means, rtol=1e-13)


def test_without_a_draw_there_is_no_interval() -> None:
    low, high = interval(bootstrap_means(np.ones((3, 2)), 0, seed=0))
    assert low.shape == high.shape == (2,)
    assert np.isnan([low, high]).all()
    with pytest.raises(UnmovedError, match="at least one image"):
        bootstrap_means(np.ones((0, 2)), 5, seed=0)
    with pytest.raises(UnmovedError, match="bootstraps"):
        bootstrap_means(np.ones((3, 2)), -1, seed=0)
