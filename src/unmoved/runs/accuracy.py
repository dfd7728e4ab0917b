"""Summarise accuracies over the seeds of a recipe: counted from outcomes, or estimated from a sample."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import pandas as pd

from unmoved.evaluation import outcomes
from unmoved.evaluation.estimate import Estimate
from unmoved.evaluation.outcomes import WORST

# A run's tables were checked when they were read.
summary = partial(outcomes.summary, is_checked=True)
per_class = partial(outcomes.per_class, is_checked=True)
curve_summary = partial(outcomes.curve_summary, is_checked=True)


class Measure(NamedTuple):
    """A row of `outcomes.across_seeds`: an accuracy averaged over seeds, and its spread.

    Attributes:
        measure: "clean", an attack's name or "worst case".
        n: images of each seed; the smallest number if they differ.
        std: divided by seeds - 1; NaN for a single seed.
        low, high: the lowest and the highest end of the seeds' 95 % intervals (Wilson's, or those of
            `estimate.Estimate.population`).
    """

    measure: str
    eps: float
    seeds: int
    n: int
    accuracy: float
    std: float
    low: float
    high: float


def worst(table: pd.DataFrame) -> pd.DataFrame:
    """Return the "worst case" row of `outcomes.summary`, for a table that was checked."""
    rows = summary(table)
    return rows[rows["measure"] == WORST]


def rows_of(tables: Sequence[pd.DataFrame], measure: Callable[[pd.DataFrame], pd.DataFrame] = summary) -> list[Measure]:
    """Return the rows of `outcomes.across_seeds` of a measure, from the outcomes of each seed."""
    table = outcomes.across_seeds(tables, measure)[list(Measure._fields)]
    return [Measure(*row) for row in table.itertuples(index=False, name=None)]


def of_estimate(estimate: Estimate, eps: float) -> Measure:
    """Return the estimate of a sampled verdict as a row, with its interval for all images like these, as Wilson's."""
    low, high = estimate.population
    return Measure(WORST, eps, 1, estimate.n, estimate.left / estimate.n, math.nan, low, high)


def across(seeds: Sequence[Measure]) -> Measure:
    """Combine the rows of single seeds into one, as `outcomes.across_seeds` does."""
    rows = pd.DataFrame(seeds)
    n, mean, std = int(rows["n"].min()), float(rows["accuracy"].mean()), float(rows["accuracy"].std())
    low, high = float(rows["low"].min()), float(rows["high"].max())
    return Measure(seeds[0].measure, seeds[0].eps, len(seeds), n, mean, std, low, high)
