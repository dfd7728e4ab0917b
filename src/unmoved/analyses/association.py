"""Measure how well one quantity predicts another: AUC and correlations, with confidence intervals.

Many samples: percentile bootstrap over the samples, `bootstrap_means` for means. A resample is kept as how often each
sample stands in it, so that all resamples are ranked at once without sorting again; the same seed and number of samples
give the same resamples, so that what is compared is drawn alike. Few runs: Fisher's z, since resampling four points
only repeats them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import scipy  # its parts load where they are used: a second that no worker waits for

from unmoved.core.errors import UnmovedError, require_choice, require_whole

CONFIRMED, REFUTED, UNDECIDED = "confirmed", "refuted", "undecided"  # the words for a claim
LEAST = 10  # samples of each kind that an interval asks for: three against three would seem certain
FEWEST_RUNS = 4
LEVEL = 0.95
CELLS = 2**18  # entries of the resamples that are worked on at a time: as many as fit into a cache


@dataclass(frozen=True, eq=False)
class Estimate:
    """Hold a measure, its 95 % interval and the samples behind it.

    Attributes:
        value: the measure; NaN where it does not exist, and ``note`` says why.
        low, high: the interval; NaN where there is none, and ``note`` says why.
        n: samples.
        note: what is missing, in words; empty where nothing is.
        draws: (bootstraps,) the measure in each resample, NaN where it does not exist there. Estimates of the same n,
            bootstraps and seed are of the same resamples: their draws may be subtracted.
    """

    value: float
    low: float
    high: float
    n: int
    note: str = ""
    draws: np.ndarray = field(default_factory=lambda: np.empty(0), repr=False)

    def row(self) -> dict[str, float | str]:
        """Return the columns value, low, high, n, note of a table."""
        return {"value": self.value, "low": self.low, "high": self.high, "n": self.n, "note": self.note}


def auc(score: npt.ArrayLike, positive: npt.ArrayLike, *, bootstraps: int = 1000, seed: int = 0) -> Estimate:
    """Estimate the probability that a positive sample has the larger score: ``P(s+ > s-) + P(s+ = s-) / 2``.

    ``(sum of the ranks of the positives - n+ (n+ + 1) / 2) / (n+ n-)``, ties at their mean rank: Mann and Whitney's U
    as a share. 0.5 says nothing; below it the negatives have the larger scores.

    Args:
        score: (n,) numbers, infinite ones too.
        positive: (n,) bool.
        bootstraps: resamples of the samples, for a percentile interval; none with fewer than 10 of either kind [S].
        seed: of the resamples.

    Raises:
        UnmovedError: lengths that differ, NaN, or ``positive`` that is not bool.
    """
    values, kinds = _column(score, "auc: score"), np.asarray(positive)
    if kinds.dtype != np.bool_ or kinds.shape != values.shape:
        raise UnmovedError(
            f"auc: expected positive to be bool of shape {values.shape}, came {kinds.dtype} {kinds.shape}"
        )
    kept, other = int(kinds.sum()), int((~kinds).sum())
    note = _constant(values, "the scores")
    if not kept or not other:
        note = f"positive: {kept} of {len(values)}, so there is nothing to tell apart"

    def measure(weights: np.ndarray) -> np.ndarray:
        many = weights[kinds].sum(axis=0)
        few = weights.sum(axis=0) - many
        ranks = np.einsum("nb,nb->b", _ranks(values, weights)[kinds], weights[kinds])
        return _divided(ranks - many * (many + 1) / 2, many * few)

    return _estimate(measure, len(values), note, min(kept, other), bootstraps, seed)


def spearman(
    x: npt.ArrayLike, y: npt.ArrayLike, *, bootstraps: int = 1000, seed: int = 0, least: int = LEAST
) -> Estimate:
    """Estimate Spearman's correlation: Pearson's of the ranks, ties at their mean rank, ranked anew in each resample.

    Args:
        x, y: (n,) numbers, infinite ones too.
        bootstraps, seed: as `auc`.
        least: samples that an interval asks for [S].

    Raises:
        UnmovedError: lengths that differ, or NaN.
    """
    a, b = _pair(x, y, "spearman")

    def measure(weights: np.ndarray) -> np.ndarray:
        return _weighted_pearson(_ranks(a, weights), _ranks(b, weights), weights)

    return _estimate(measure, len(a), _constant(a, "x") or _constant(b, "y"), len(a), bootstraps, seed, least)


def rank_correlations(rows: np.ndarray, x: npt.ArrayLike) -> np.ndarray:
    """Compute Spearman's correlation (R,) of each row of ``rows`` (R, n) with ``x`` (n,); NaN where one is constant."""
    ranks = scipy.stats.rankdata(rows, axis=1).T
    return _weighted_pearson(ranks, scipy.stats.rankdata(x)[:, None], np.ones_like(ranks))


def fisher(x: npt.ArrayLike, y: npt.ArrayLike, measure: str = "Pearson") -> Estimate:
    """Estimate a correlation of few points (runs) with Fisher's interval, ``tanh(atanh r -+ 1.96 s)``.

    ``s = 1 / sqrt(n - 3)`` for Pearson; ``sqrt((1 + r^2 / 2) / (n - 3))`` for Spearman (Bonett and Wright 2000). A
    Spearman of 1 counts for its interval as half a swap of two neighbours away, ``1 - 6 / (n (n^2 - 1))``, since an
    order that is the same by luck is no certainty (1 in 24 for four runs) [S].

    Args:
        x, y: (n,) finite numbers; the interval asks for n >= 4, the value for n >= 3.
        measure: ``"Pearson"`` or ``"Spearman"``.

    Raises:
        UnmovedError: lengths that differ, numbers that are not finite, or an unknown measure.
    """
    require_choice("measure", measure, ("Pearson", "Spearman"))
    a, b = _pair(x, y, "fisher", finite=True)
    n, note = len(a), _constant(a, "x") or _constant(b, "y")
    if n < 3:
        note = f"a correlation needs at least 3 runs, came {n}"
    if note:
        return Estimate(math.nan, math.nan, math.nan, n, note)
    stats = scipy.stats
    r = float(
        stats.pearsonr(_scaled(a), _scaled(b)).statistic if measure == "Pearson" else stats.spearmanr(a, b).statistic
    )
    if n < FEWEST_RUNS:
        return Estimate(r, math.nan, math.nan, n, f"an interval needs at least {FEWEST_RUNS} runs, came {n}")
    most = 1 - (6 / (n * (n * n - 1)) if measure == "Spearman" else 1e-12)
    counted = min(max(r, -most), most)
    width = math.sqrt((1 + (counted**2 / 2 if measure == "Spearman" else 0)) / (n - 3)) * float(stats.norm.ppf(0.975))
    low, high = (math.tanh(math.atanh(counted) + side * width) for side in (-1, 1))
    return Estimate(r, min(low, r), max(high, r), n)


def bootstrap_means(values: np.ndarray, bootstraps: int, seed: int) -> np.ndarray:
    """Compute means over N images drawn with replacement, ``(1/N) sum_i count_i values_i``, one draw for all columns.

    Sharing the draw keeps what the columns have in common: a difference of two of them has a paired interval.

    Args:
        values: (N, D), one row an image.
        bootstraps: number of draws; 0 gives none.
        seed: of the draws; the same seed and N draw the same images.

    Returns:
        (bootstraps, D) float64.

    Raises:
        UnmovedError: no image, or a negative number of draws.
    """
    bootstraps = require_whole("bootstraps", bootstraps, at_least=0)
    if values.ndim != 2 or len(values) == 0:
        raise UnmovedError(f"bootstrap: expected values (N, D) of at least one image, came {values.shape}")
    n, values = len(values), values.astype(np.float64)
    means = [counts.T @ values / n for counts in _resamples(n, bootstraps, seed)]
    return np.concatenate([np.empty((0, values.shape[1])), *means])


def interval(draws: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the percentile interval (95 %) over the first axis; NaN where there is no draw."""
    if len(draws) == 0:
        nothing = np.full(draws.shape[1:], math.nan)
        return nothing, nothing
    low, high = np.quantile(draws, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=0)
    return low, high


def percentiles(draws: np.ndarray) -> tuple[float, float]:
    """Return the `interval` of the draws (R,) that exist, those that are not NaN."""
    low, high = interval(draws[~np.isnan(draws)])
    return float(low), float(high)


def _resamples(n: int, bootstraps: int, seed: int) -> Iterator[np.ndarray]:
    """Yield (n, r) float64, how often each sample stands in each of r resamples; drawn one resample after the other."""
    rng, most = np.random.default_rng(require_whole("seed", seed, at_least=0)), max(1, CELLS // n)
    for start in range(0, bootstraps, most):
        some = min(most, bootstraps - start)
        drawn = rng.integers(n, size=(some, n)) * some + np.arange(some)[:, None]
        yield np.bincount(drawn.ravel(), minlength=n * some).reshape(n, some).astype(float)


def _estimate(
    measure: Callable[[np.ndarray], np.ndarray],
    n: int,
    note: str,
    fewest: int,
    bootstraps: int,
    seed: int,
    least: int = LEAST,
) -> Estimate:
    """Estimate a measure that is given as a function of how often each sample stands: (n, r) -> (r,).

    Args:
        fewest: samples of the kind that there are fewest of; fewer than ``least`` have no interval.
    """
    bootstraps = require_whole("bootstraps", bootstraps, at_least=1)
    if note:
        return Estimate(math.nan, math.nan, math.nan, n, note, np.full(bootstraps, math.nan))
    value = float(measure(np.ones((n, 1)))[0])
    if fewest < least:
        note = f"an interval needs at least {least} samples of each kind, came {fewest}"
        return Estimate(value, math.nan, math.nan, n, note, np.full(bootstraps, math.nan))
    draws = np.concatenate([measure(weights) for weights in _resamples(n, bootstraps, seed)])
    return Estimate(value, *percentiles(draws), n, draws=draws)


def _ranks(x: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Return (n, r), the mean rank of each value in a resample where sample i stands weights[i] times."""
    values, group = np.unique(x, return_inverse=True)
    order = np.argsort(group, kind="stable")
    here = weights[order]
    if len(values) < len(x):
        here = np.add.reduceat(here, np.searchsorted(group[order], np.arange(len(values))), axis=0)
    return (np.cumsum(here, axis=0) - (here - 1) / 2)[group]


def _weighted_pearson(x: np.ndarray, y: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Correlate (r,) x and y, (n, r) or (n, 1), and weights (n, r); NaN where one of them does not vary."""
    n = weights.sum(axis=0)
    dx, dy = (v - (weights * v).sum(axis=0) / n for v in (x, y))
    by_x, by_y = weights * dx, weights * dy
    xy, xx, yy = (np.einsum("nb,nb->b", *pair) for pair in ((by_x, dy), (by_x, dx), (by_y, dy)))
    # Both are scaled to about 1 or are ranks, so what rounding leaves of a constant is far below this.
    varies = (xx > 1e-24) & (yy > 1e-24)
    return _divided(xy, np.where(varies, np.sqrt(xx * yy), 0)).clip(-1, 1)


def _scaled(v: np.ndarray) -> np.ndarray:
    """Centre and scale to a largest size of 1: a correlation does not change, and its sums lose no digits."""
    centred: np.ndarray = v - v.mean()
    scaled: np.ndarray = centred / np.abs(centred).max()
    return scaled


def _divided(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    quotient: np.ndarray = np.divide(above, below, out=np.full(len(above), math.nan), where=below > 0)
    return quotient


def _column(values: npt.ArrayLike, name: str, finite: bool = False) -> np.ndarray:
    column = np.asarray(values, dtype=float)
    if column.ndim != 1 or np.isnan(column).any() or (finite and not np.isfinite(column).all()):
        came = f"shape {column.shape}" if column.ndim != 1 else "NaN" if np.isnan(column).any() else "infinity"
        raise UnmovedError(f"{name}: expected one column of {'finite ' * finite}numbers, came {came}; leave such out")
    return column


def _pair(x: npt.ArrayLike, y: npt.ArrayLike, name: str, finite: bool = False) -> tuple[np.ndarray, np.ndarray]:
    a, b = _column(x, f"{name}: x", finite), _column(y, f"{name}: y", finite)
    if len(a) != len(b):
        raise UnmovedError(f"{name}: expected x and y of one length, came {len(a)} and {len(b)}")
    return a, b


def _constant(values: np.ndarray, name: str) -> str:
    if len(values) < 2:
        return f"{len(values)} samples are too few"
    return f"all of {name} are the same" if values.max() == values.min() else ""
