"""Summarise a corruption sweep: means with intervals, theory beside them, and whether flat goes with robust."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import scipy  # its parts load where they are used: a second that no worker waits for

from unmoved.analyses.association import CONFIRMED, REFUTED, UNDECIDED, spearman
from unmoved.analyses.corruption import ADVERSARIAL, RANDOM, expected_ratio
from unmoved.core.errors import UnmovedError, require_columns, require_whole

LOSS, ACCURACY = "loss", "accuracy"
MEASURED = ("draw", "steps", "loss", "accuracy", "loss_change", "accuracy_change", "linear_change", "first_order")
CONTROLLED, FIRST_ORDER = ("controlled", "controlled_low", "controlled_high"), ("first_order", "first_order_expected")
DERIVED = ("draws", "mean", "low", "high", *CONTROLLED, *FIRST_ORDER, "observed_ratio")
LEAST_RUNS = 6


def summarise(table: pd.DataFrame) -> pd.DataFrame:
    """Summarise, one row per measure, kind, scope and eps: the mean change over the draws and its 95 % interval.

    ``low, high = mean -+ t_{0.975, draws - 1} std / sqrt(draws)``: how sure the mean over corruptions of this model is
    (images and weights are held). Columns of the table that are no measurement are kept as keys, so that sweeps with a
    run, a seed or a view beside them may stand one below the other.

    Args:
        table: from `corruption.sweep`, one or several.

    Returns:
        measure ("loss": I_ave or I_max; "accuracy"), the keys (kind, scope, p, n, k, eps, eps_relative, clean_loss,
        clean_accuracy, images and the caller's own), draws, mean, low, high (NaN for fewer than two draws); and, where
        measure is "loss" and kind is "random": controlled, controlled_low, controlled_high (``mean DL(r) - r.g``, the
        same expectation as I_ave since E[r] = 0, without the noise of the slope, which hides the curvature at small
        eps; our own choice), first_order (mean of ``|r.g| / (eps ||g||_q)`` over the draws), first_order_expected
        (`expected_ratio` of k, for p = 2 without n, otherwise NaN), observed_ratio (``mean |DL(r)| / I_max``; NaN
        without an adversarial row, or with I_max = 0).

    Raises:
        UnmovedError: a column is missing, or there is no row.
    """
    needed = [*MEASURED, "kind", "scope", "p", "n", "k", "eps"]
    require_columns(table, needed, "summarise")
    keys = [name for name in table.columns if name not in MEASURED]
    table = table.assign(size=table["loss_change"].abs(), controlled=table["loss_change"] - table["linear_change"])
    loss, accuracy = (_means(table, keys, f"{name}_change").assign(measure=name) for name in (LOSS, ACCURACY))
    controlled = _means(table, keys, "controlled")
    of_draws = table.groupby(keys, sort=False, dropna=False)[["first_order", "size"]].mean().reset_index(drop=True)
    random, others = loss["kind"] == RANDOM, [name for name in keys if name != "kind"]
    top = loss[~random].set_index(others)["mean"]
    worst = loss[others].merge(top.rename("top").reset_index(), "left", others)["top"].to_numpy(float)
    closed = random & (loss["p"] == 2) & loss["n"].isna()
    for name, column in zip(CONTROLLED, ("mean", "low", "high"), strict=True):
        loss[name] = controlled[column].where(random)
    loss["first_order"] = of_draws["first_order"].where(random)
    loss["first_order_expected"] = loss["k"].map(expected_ratio).where(closed)
    loss["observed_ratio"] = (of_draws["size"] / np.where(worst > 0, worst, np.nan)).where(random)
    both = pd.concat([loss, accuracy], ignore_index=True)
    return both[["measure", *both.columns.drop("measure")]]


def _means(table: pd.DataFrame, keys: list[str], column: str) -> pd.DataFrame:
    """Return the keys, draws, mean, low and high of each group, by Student's t."""
    groups = table.groupby(keys, sort=False, dropna=False)[column]
    means = groups.agg(draws="size", mean="mean", spread="std").reset_index()
    half = scipy.stats.t.ppf(0.975, means["draws"] - 1) * means.pop("spread") / np.sqrt(means["draws"])
    return means.assign(low=means["mean"] - half, high=means["mean"] + half)


def indicators(summary: pd.DataFrame, eps_relative: float, *, scope: str = "global") -> pd.DataFrame:
    """Return I_max and I_ave at one relative eps, one row per run (and whatever else the caller's own keys tell apart).

    I_ave is the controlled mean of `summarise`.

    Args:
        summary: from `summarise`, with adversarial and random rows at this eps.

    Returns:
        The keys but for kind, with columns i_max and i_ave.

    Raises:
        UnmovedError: nothing was measured there.
    """
    require_columns(summary, ["measure", "kind", "scope", "eps_relative", "mean", "controlled"], "indicators")
    rows = summary[(summary["measure"] == LOSS) & (summary["scope"] == scope)]
    rows = rows[np.isclose(rows["eps_relative"].to_numpy(float), eps_relative, rtol=1e-6)]
    if set(rows["kind"]) != {RANDOM, ADVERSARIAL}:
        known = sorted({float(f"{value:.6g}") for value in summary["eps_relative"]})
        raise UnmovedError(
            f"indicators: expected random and adversarial rows of scope {scope!r} at eps_relative {eps_relative:g}, "
            f"came {sorted(set(rows['kind']))}; there are scopes {sorted(set(summary['scope']))} and eps {known}"
        )
    keys = [name for name in rows.columns if name not in (*DERIVED, "kind", "measure")]
    rows = rows.assign(eps_relative=float(eps_relative))  # rounding would tell two sweeps of one eps apart
    worst = rows[rows["kind"] == ADVERSARIAL].rename(columns={"mean": "i_max"})[[*keys, "i_max"]]
    mean = rows[rows["kind"] == RANDOM].rename(columns={"controlled": "i_ave"})[[*keys, "i_ave"]]
    both: pd.DataFrame = worst.merge(mean, "inner", keys)
    return both


def claims(table: pd.DataFrame, *, resamples: int = 2000, seed: int = 0) -> pd.DataFrame:
    """Judge whether flatness under corruption goes with robustness and with accuracy, by Spearman's rho over runs.

    The claim is that runs whose loss changes less are more accurate: rho between an indicator and an accuracy below 0.
    The rule: "confirmed" where the whole 95 % interval of rho lies below 0, "refuted" where it lies above 0, otherwise
    "undecided", and always so with fewer than 6 runs (there the interval errs too often) or where one side does not
    vary. The interval is a percentile bootstrap over runs (resamples without a rho are left out), which takes the
    runs for independent: seeds of one recipe are less than that. The rule is our own choice. A correlation over
    recipes is no cause.

    Args:
        table: one row per run: name, i_max, i_ave (at one relative eps, see `indicators`), clean_accuracy,
            robust_accuracy (shares).

    Returns:
        indicator ("I_max", "I_ave"), accuracy ("robust", "clean"), rho, low, high (NaN where undefined), runs, verdict,
        sentence.

    Raises:
        UnmovedError: a column is missing or not finite, no row, or fewer than 100 resamples.
    """
    sides = {"I_max": "i_max", "I_ave": "i_ave"}, {"robust": "robust_accuracy", "clean": "clean_accuracy"}
    require_columns(table, ["name", *sides[0].values(), *sides[1].values()], "claims")
    resamples = require_whole("claims: resamples", resamples, at_least=100)
    for column in (*sides[0].values(), *sides[1].values()):
        if not np.isfinite(table[column].to_numpy(float)).all():
            raise UnmovedError(f"claims: expected finite numbers in {column!r}, came {table[column].tolist()}")
    rows = []
    for indicator, first in sides[0].items():
        for accuracy, second in sides[1].items():
            estimate = spearman(table[first], table[second], bootstraps=resamples, seed=seed, least=2)
            rho, low, high = estimate.value, estimate.low, estimate.high
            decided = len(table) >= LEAST_RUNS
            word = CONFIRMED if decided and high < 0 else REFUTED if decided and low > 0 else UNDECIDED
            numbers = {"rho": rho, "low": low, "high": high, "runs": len(table), "verdict": word}
            sentence = _sentence(indicator, accuracy, rho, low, high, len(table), word)
            rows.append({"indicator": indicator, "accuracy": accuracy, **numbers, "sentence": sentence})
    return pd.DataFrame(rows)


def _sentence(indicator: str, accuracy: str, rho: float, low: float, high: float, runs: int, word: str) -> str:
    claim = f"Flatness under corruption goes with {accuracy} accuracy: {word}"
    if math.isnan(rho):
        return f"{claim} ({indicator} or {accuracy} accuracy does not vary over {runs} runs)."
    evidence = f"Spearman's rho of {indicator} and {accuracy} accuracy {rho:+.2f}"
    evidence += "" if math.isnan(low) else f", 95 % interval {low:+.2f} to {high:+.2f}"
    few = f"; fewer than {LEAST_RUNS} decide nothing" if runs < LEAST_RUNS else ""
    return f"{claim} ({evidence}, {runs} runs{few})."
