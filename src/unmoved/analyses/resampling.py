"""The bootstrap over test images: the same images are drawn for everything that is compared."""

from __future__ import annotations

import numpy as np

from unmoved.core.errors import UnmovedError, require_whole

LEVEL = 0.95
AT_ONCE = 4_000_000  # drawn images held in memory at a time


def bootstrap_means(values: np.ndarray, bootstraps: int, seed: int) -> np.ndarray:
    """Means over N images drawn with replacement, ``(1/N) sum_i count_i values_i``, one draw for all columns.

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
    draw = np.random.default_rng(require_whole("seed", seed, at_least=0))
    means = np.empty((bootstraps, values.shape[1]))
    rows = max(1, AT_ONCE // n)
    for start in range(0, bootstraps, rows):
        part = means[start : start + rows]
        drawn = draw.integers(n, size=(len(part), n)) + n * np.arange(len(part))[:, None]
        counts = np.bincount(drawn.ravel(), minlength=drawn.size).reshape(drawn.shape)
        part[:] = counts.astype(np.float64) @ values / n
    return means


def interval(draws: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The percentile interval (95 %) over the first axis; NaN where there is no draw."""
    if len(draws) == 0:
        nothing = np.full(draws.shape[1:], np.nan)
        return nothing, nothing
    low, high = np.quantile(draws, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=0)
    return low, high
