"""Test whether the result of an attack follows the distribution of the softmax over the wrong classes.

DRSL (Wang et al. 2023, arXiv 2303.12363) says that it does: the more the probabilities of the wrong classes differ,
the less robust. The paper's own statistic is not known to us; these are a reconstruction [R], and so is the plan: who
falls (`within` one model), where to (`landings`), and which models are robust (`across` runs).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from unmoved.analyses.association import (
    CONFIRMED,
    REFUTED,
    UNDECIDED,
    Estimate,
    auc,
    fisher,
    percentiles,
    spearman,
)
from unmoved.analyses.softmax_observed import COLUMNS, STATISTICS, VIEWS, collect, collect_batch, observe, statistics
from unmoved.core.batch import Table
from unmoved.core.errors import UnmovedError, require_choice, require_columns
from unmoved.evaluation.outcomes import wilson

__all__ = [
    "claims",
    "COLUMNS",
    "STATISTICS",
    "VIEWS",
    "Claim",
    "across",
    "collect",
    "collect_batch",
    "landings",
    "observe",
    "statistics",
    "summary",
    "within",
]

# Which sign DRSL's claim gives each statistic in images that fall: diverse wrong classes, or near the boundary.
CLAIMED = {"variance": 1, "std": 1, "entropy": -1, "gap": 1, "p_true": -1, "margin": -1}
NAMES = {
    "variance": "the variance of log p over the wrong classes",
    "std": "the standard deviation of p over the wrong classes",
    "entropy": "minus the entropy of the wrong classes",
    "gap": "the gap of the two most probable wrong classes",
}
STRONG = 0.5


@dataclass(frozen=True)
class Claim:
    """Hold a claim by name, the word that the intervals give it (confirmed, refuted, undecided), and the sentence."""

    claim: str
    word: str
    sentence: str


def within(table: Table, *, bootstraps: int = 1000, seed: int = 0) -> Table:
    """Ask within one model which of the samples that it gets right fall, and how far from the boundary they are.

    Args:
        table: from `observe` or `collect`.
        bootstraps, seed: of the percentile intervals, see `association`; the same resamples for all statistics.

    Returns:
        A row per view, statistic and target: ``against`` "attack succeeded" (``measure`` "AUC", above 0.5 where
        those that fall have the larger values) or "minimal eps" ("Spearman", inf ranked last, NaN left out);
        ``value``, ``low``, ``high``, ``n``, ``note`` as `Estimate`; and how much more than the plain margin it says,
        ``over_margin`` = |value - chance| - |the margin's - chance|, with a paired interval ``over_low``,
        ``over_high``. The clean view predicts; in the adversarial one a fallen image's landing is itself diversity.

    Raises:
        UnmovedError: columns or rows are missing, or a sample stands twice in a view.
    """
    table, rows = _checked(table, "within"), []
    for view in VIEWS:
        seen = table[(table["view"] == view) & table["clean_correct"]]
        known = seen[seen["min_eps"].notna()]
        fell, how = seen["success"].to_numpy(bool), {"bootstraps": bootstraps, "seed": seed}
        aucs = {name: auc(seen[name], fell, **how) for name in STATISTICS}
        correlations = {name: spearman(known[name], known["min_eps"], **how) for name in STATISTICS}
        for against, measure, by_name, chance in (
            ("attack succeeded", "AUC", aucs, 0.5),
            ("minimal eps", "Spearman", correlations, 0.0),
        ):
            what = {"view": view, "against": against, "measure": measure}
            rows += [{**what, "statistic": name, **_row(e, by_name["margin"], chance)} for name, e in by_name.items()]
    return pd.DataFrame(rows)


def _row(estimate: Estimate, margin: Estimate, chance: float) -> dict[str, float | str]:
    over = abs(estimate.value - chance) - abs(margin.value - chance)
    low, high = percentiles(np.abs(estimate.draws - chance) - np.abs(margin.draws - chance))
    return estimate.row() | {"over_margin": over, "over_low": low, "over_high": high}


def landings(table: Table) -> Table:
    """Count where the fallen land: the share for each rank of the clean wrong classes (1 the most probable).

    Returns:
        ``rank`` 1..K-1, ``count``, ``n`` (fallen samples that were right as they were), ``share``, ``low``, ``high``
        (95 % Wilson; NaN where none fell) and ``uniform`` = 1 / (K - 1), the share without any preference.

    Raises:
        UnmovedError: as `within`; runs with different numbers of classes.
    """
    table = _checked(table, "landings")
    classes = table["num_classes"].unique()
    if len(classes) > 1:
        raise UnmovedError(f"landings: expected one number of classes, came {sorted(classes)}; one table per run")
    ranks = table.loc[table["view"] == "clean", "landing_rank"].dropna()
    n, rows = len(ranks), []
    for rank in range(1, int(classes[0])):
        count = int((ranks == rank).sum())
        low, high = wilson(count, n) if n else (np.nan, np.nan)
        share = count / n if n else np.nan
        rows.append({"rank": rank, "count": count, "n": n, "share": share, "low": low, "high": high})
    return pd.DataFrame(rows).assign(uniform=1 / (int(classes[0]) - 1))


def summary(tables: Mapping[str, Table]) -> Table:
    """Tabulate one row per run: run, n, clean_accuracy, robust_accuracy, each statistic's mean over clean images.

    Raises:
        UnmovedError: no run; as `within`.
    """
    if not tables:
        raise UnmovedError("summary: expected at least one run, came none")
    rows = []
    for run, table in tables.items():
        clean = _only(_checked(table, f"summary, {run}"), "summary", view="clean")
        right, means = clean["clean_correct"].astype(bool), clean[list(STATISTICS)].mean()
        robust = (right & ~clean["success"].astype(bool)).mean()
        rows.append({"run": run, "n": len(clean), "clean_accuracy": right.mean(), "robust_accuracy": robust, **means})
    return pd.DataFrame(rows)


def across(summary: Table) -> Table:
    """Ask across runs whether the mean of a statistic goes with robust, and with clean accuracy.

    Args:
        summary: from `summary`; robust accuracies of one threat model and attack.

    Returns:
        A row per statistic, accuracy (``against``) and ``measure`` ("Pearson", "Spearman"), with ``value``, ``low``,
        ``high`` (Fisher's interval, see `association.fisher`; for 4 runs and more), ``n`` = runs, ``note``.

    Raises:
        UnmovedError: columns or rows are missing.
    """
    require_columns(summary, ("clean_accuracy", "robust_accuracy", *STATISTICS), "across")
    return pd.DataFrame(
        [
            {
                "statistic": name,
                "against": accuracy.replace("_", " "),
                "measure": measure,
                **fisher(summary[name], summary[accuracy], measure).row(),
            }
            for name in STATISTICS
            for accuracy in ("robust_accuracy", "clean_accuracy")
            for measure in ("Pearson", "Spearman")
        ]
    )


def claims(
    within: Mapping[str, Table], landings: Mapping[str, Table], across: Table, statistic: str = "variance"
) -> list[Claim]:
    """Judge DRSL's claim from the tables, in words that follow from 95 % intervals.

    Five claims. Over runs, a claim is confirmed where more than half of the runs that have an interval speak for it
    and none against it, refuted the other way round, else undecided. A run speaks for
    "who falls" with an AUC (clean view, turned by `CLAIMED`) wholly above 0.5, against it wholly below;
    "more than the margin" with ``over_low`` > 0, against it with ``over_high`` < 0;
    "where to" with a share of rank 1 wholly above uniform, against it wholly below (K > 2).
    By Spearman's correlation r of the mean diversity (the statistic turned by `CLAIMED`) over the runs,
    "robust accuracy" is confirmed where r <= -0.5 and the interval is wholly below 0, refuted wholly above 0;
    "clean accuracy" (no positive one) is refuted wholly above 0, else confirmed wholly below 0.5. The limit 0.5 for
    what is strong is our choice [S].

    Args:
        within, landings: the tables of `within` and `landings` by the name of the run.
        across: the table of `across`.
        statistic: variance, std, entropy or gap.

    Raises:
        UnmovedError: an unknown statistic; no run; columns or rows are missing.
    """
    require_choice("claims.statistic", statistic, tuple(NAMES))
    if not within or within.keys() != landings.keys():
        raise UnmovedError(
            f"claims: expected `within` and `landings` of the same runs, at least one, "
            f"came {sorted(within)} and {sorted(landings)}"
        )
    name, sign = NAMES[statistic], CLAIMED[statistic]
    fall, beyond, land = [], [], []
    for run, table in within.items():
        require_columns(table, ("view", "statistic", "measure", "value", "low", "high", "over_low", "over_high"), run)
        row = _only(table, run, view="clean", statistic=statistic, measure="AUC").iloc[0]
        value, *ends = (0.5 + sign * (row[column] - 0.5) for column in ("value", "low", "high"))
        fall.append((value, min(ends) - 0.5, max(ends) - 0.5))
        beyond.append((row["over_margin"], row["over_low"], row["over_high"]))
    for run, table in landings.items():
        require_columns(table, ("share", "low", "high", "uniform"), run)
        share, low, high, uniform = table.iloc[0][["share", "low", "high", "uniform"]]
        # One wrong class leaves no choice.
        land.append((share, low - uniform, high - uniform) if uniform < 1 else (np.nan, np.nan, np.nan))
    return [
        _counted("who falls", fall, f"{name} is larger for images that fall (AUC, in the claimed direction, {{}})"),
        _counted("more than the margin", beyond, f"{name} says more of who falls than the margin does (AUC, {{}})"),
        _counted("where to", land, "the fallen land in the most probable wrong class more than uniformly (share {})"),
        *(_over_runs(across, statistic, accuracy) for accuracy in ("robust accuracy", "clean accuracy")),
    ]


def _counted(claim: str, runs: Sequence[tuple[float, float, float]], words: str) -> Claim:
    """Judge a claim from each run's (value, low, high), the ends relative to chance; NaN ends do not judge."""
    judged = [run for run in runs if not np.isnan(run[1])]
    above, below = sum(low > 0 for _, low, _ in judged), sum(high < 0 for *_, high in judged)
    word = _word(2 * above > len(judged) and not below, 2 * below > len(judged) and not above)
    values = [value for value, *_ in judged]
    said = words.format(f"{min(values):.2f} to {max(values):.2f}" if values else "unknown")
    left = f"; {len(runs) - len(judged)} without an interval" if len(runs) > len(judged) else ""
    return Claim(
        claim,
        word,
        f"{said[0].upper()}{said[1:]}: {word}; {above} of {len(judged)} runs for it, {below} against{left}.",
    )


def _over_runs(across: Table, statistic: str, accuracy: str) -> Claim:
    require_columns(across, ("statistic", "against", "measure", "value", "low", "high", "n", "note"), "claims: across")
    row = _only(across, "claims: across", statistic=statistic, against=accuracy, measure="Spearman").iloc[0]
    value, *ends = (CLAIMED[statistic] * row[column] for column in ("value", "low", "high"))
    low, high = sorted(ends)
    if accuracy == "robust accuracy":
        words, confirmed = "lower", value <= -STRONG and high < 0
    else:
        words, confirmed = "not higher", high < STRONG and not low > 0
    word = _word(confirmed, low > 0)
    said = row["note"] if np.isnan(low) else f"Spearman {value:+.2f}, interval {low:+.2f} to {high:+.2f}"
    return Claim(
        accuracy,
        word,
        f"Over {row['n']} runs, {accuracy} is {words} with a larger mean of {NAMES[statistic]}: {word}; {said}.",
    )


def _word(confirmed: bool, refuted: bool) -> str:
    return CONFIRMED if confirmed else REFUTED if refuted else UNDECIDED


def _checked(table: Table, who: str) -> Table:
    require_columns(table, COLUMNS, who)
    twice = table.duplicated(["view", "index"])
    if twice.any():
        raise UnmovedError(f"{who}: sample {table.loc[twice, 'index'].iloc[0]} stands twice; join each batch once")
    return table.assign(clean_correct=table["clean_correct"].astype(bool), success=table["success"].astype(bool))


def _only(table: Table, who: str, **values: str) -> Table:
    """Return the rows with these values, at least one."""
    for column, value in values.items():
        table = table[table[column] == value]
    if table.empty:
        raise UnmovedError(f"{who}: expected rows of {values}, came none; pass the whole table")
    return table
