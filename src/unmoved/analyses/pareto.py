"""Find the Pareto front of clean and robust accuracy, and which methods are on it or dominated.

A setting is a method at one strength (the beta of TRADES, say); its accuracies are means over its seeds. Intervals are
95 % percentile intervals of a bootstrap over the test images, paired: every setting is judged on the same drawn images.
They hold for the weights at hand and say nothing of other seeds.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import pandas as pd

from unmoved.analyses.association import LEVEL, UNDECIDED, bootstrap_means, interval
from unmoved.core.errors import UnmovedError, require_columns

RunKey: TypeAlias = tuple[str, float, int]
ALL = "all methods"
ON_FRONT, DOMINATED = "on the front", "dominated"
ROWS = ("method", "strength", "seed", "clean", "robust", "n")


@dataclass(frozen=True, eq=False)
class TradeOff:
    """Hold the tables of `trade_off`; accuracies are shares, ``share`` columns are shares of the bootstraps.

    Attributes:
        runs: one row a run: method, strength, seed, clean, robust, n.
        points: one row a setting, by method and strength: method, strength, seeds, n, clean, clean_low, clean_high,
            clean_std, robust, robust_low, robust_high, robust_std (std over seeds, NaN for one), on_front, share (in
            which it is on the front). The rows of one method are its own curve.
        stretches: the front from left to right: from, to (clean accuracy), robust, method, strength, share (in which
            no other method is more robust at this point's own clean accuracy or above). Equal points share a stretch.
        areas: one row a method and one for ``"all methods"``: method, settings, n, area, low, high, gain, gain_low,
            gain_high (what the area of all would lack without it), share (in which it has a point on the front).
        dominance: one row a pair: method, by, share (in which every point of ``method`` is dominated by a point of
            ``by``), any_share (in which one of them is).
    """

    runs: pd.DataFrame
    points: pd.DataFrame
    stretches: pd.DataFrame
    areas: pd.DataFrame
    dominance: pd.DataFrame


def dominates(clean: np.ndarray, robust: np.ndarray) -> np.ndarray:
    """Return ``[..., i, j]``: point i is at least as good as j in both accuracies (..., M), and better in one."""
    c, r, other_c, other_r = clean[..., :, None], robust[..., :, None], clean[..., None, :], robust[..., None, :]
    return (c >= other_c) & (r >= other_r) & ((c > other_c) | (r > other_r))


def front_area(clean: np.ndarray, robust: np.ndarray) -> np.ndarray:
    """Integrate the staircase, ``int_0^1 max {robust_i : clean_i >= c} dc``: the hypervolume above (0, 0).

    One point has the area clean * robust; more points never make it smaller, so a method that was tried at more
    strengths has an advantage. Over (..., M) points, in [0, 1].
    """
    order = np.argsort(clean, axis=-1)
    c, r = np.take_along_axis(clean, order, -1), np.take_along_axis(robust, order, -1)
    heights = np.maximum.accumulate(r[..., ::-1], axis=-1)[..., ::-1]
    area: np.ndarray = (np.diff(c, axis=-1, prepend=0) * heights).sum(axis=-1)
    return area


def trade_off(
    samples: Mapping[RunKey, tuple[np.ndarray, np.ndarray]], *, bootstraps: int = 2000, seed: int = 0
) -> TradeOff:
    """Find the front of clean against robust accuracy and who owns it, from what each run got right, image by image.

    Args:
        samples: (method, strength, seed) -> (clean_right, robust_right), (N,) bool each, on the same images in the
            same order for all runs: the columns "clean" and "worst case" of `outcomes.by_sample`. The strength is NaN
            where a method has none.
        bootstraps: draws of the test images.
        seed: of the draws.

    Raises:
        UnmovedError: no run; arrays that are not bool or differ in length; an image that is robust yet wrong clean;
            a method called "all methods"; one run twice.
    """
    if not samples:
        raise UnmovedError("trade_off: expected at least one run, came none")
    answers = [_answers(key, *pair) for key, pair in samples.items()]
    lengths = sorted({len(right) for right in answers})
    if len(lengths) > 1:
        raise UnmovedError(
            f"trade_off: expected every run on the same images, came runs on {lengths} images; judge all on the same"
        )
    rows = [(*key, *right.mean(axis=0), lengths[0]) for key, right in zip(samples, answers, strict=True)]
    runs, setting = _settings(pd.DataFrame(rows, columns=list(ROWS)))
    n, seeds = lengths[0], np.bincount(setting)
    times = np.lcm.reduce(seeds)  # whole numbers have exact sums, so that equal settings stay equal in every draw
    right = np.zeros((n, 2, len(seeds)))
    for place, number in zip(runs.index, setting, strict=True):
        right[:, :, number] += (times // seeds[number]) * answers[int(place)]
    values = right.reshape(n, -1)
    means = np.concatenate([values.sum(axis=0)[None] / (n * times), bootstrap_means(values, bootstraps, seed) / times])
    clean, robust = means.reshape(-1, 2, len(seeds)).transpose(1, 0, 2)
    return _assess(runs, setting, clean, robust)


def _answers(key: RunKey, clean_right: np.ndarray, robust_right: np.ndarray) -> np.ndarray:
    """Check the two arrays of one run, and stack them to (N, 2) bool."""
    clean, robust = np.asarray(clean_right), np.asarray(robust_right)
    if clean.dtype != bool or robust.dtype != bool or clean.ndim != 1 or clean.shape != robust.shape or not len(clean):
        raise UnmovedError(
            f"trade_off, run {key}: expected two bool arrays (N,) of at least one image, came {clean.dtype} "
            f"{clean.shape} and {robust.dtype} {robust.shape}"
        )
    if (robust & ~clean).any():
        raise UnmovedError(
            f"trade_off, run {key}: {int((robust & ~clean).sum())} images are robust yet wrong without an attack; a "
            "robust image is right clean and stays right; are the two arrays exchanged?"
        )
    return np.stack([clean, robust], axis=1)


def _settings(runs: pd.DataFrame) -> tuple[pd.DataFrame, np.ndarray]:
    """Sort runs by method (as they came), strength and seed, their index kept, and number their settings."""
    names = list(dict.fromkeys(runs["method"]))
    if not all(isinstance(name, str) and name for name in names) or ALL in names:
        raise UnmovedError(f"trade_off: expected method names other than {ALL!r}, came {names}")
    if runs.duplicated(["method", "strength", "seed"]).any():
        method, strength, seed = runs.loc[runs.duplicated(["method", "strength", "seed"]), list(ROWS[:3])].iloc[0]
        raise UnmovedError(f"trade_off: {method!r} of strength {strength} and seed {seed} stands twice")
    runs = runs.assign(strength=runs["strength"].astype(float), place=runs["method"].map(names.index))
    runs = runs.sort_values(["place", "strength", "seed"], kind="stable")
    setting = runs.groupby(["place", "strength"], sort=False, dropna=False).ngroup()
    return runs.drop(columns="place"), setting.to_numpy()


def _assess(runs: pd.DataFrame, setting: np.ndarray, clean: np.ndarray, robust: np.ndarray) -> TradeOff:
    """Make all tables; row 0 of clean and robust (1 + bootstraps, M) holds the estimates, the others one draw each."""
    groups = runs.groupby(setting)
    points = groups.agg(method=("method", "first"), strength=("strength", "first"), seeds=("n", "size"), n=("n", "min"))
    for name, values in (("clean", clean), ("robust", robust)):
        low, high = interval(values[1:])
        points = points.assign(**{name: values[0], f"{name}_low": low, f"{name}_high": high})
        points[f"{name}_std"] = groups[name].std()
    dominated = dominates(clean, robust)
    front = ~np.any(dominated, axis=1)
    points = points.assign(on_front=front[0], share=_share(front)).reset_index(drop=True)
    method, names = points["method"].to_numpy(), list(dict.fromkeys(points["method"]))
    areas = [_area_row(ALL, np.ones(len(method), bool), points, clean, robust, front)]
    areas += [_area_row(name, method == name, points, clean, robust, front) for name in names]
    pairs = []
    for name in names:
        for other in names:
            if name != other:
                lost = np.any(dominated[:, method == other][:, :, method == name], axis=1)
                pairs.append((name, other, _share(np.all(lost, axis=1)), _share(np.any(lost, axis=1))))
    return TradeOff(
        runs.reset_index(drop=True),
        points,
        _stretches(points, clean, robust),
        pd.DataFrame(areas),
        pd.DataFrame(pairs, columns=["method", "by", "share", "any_share"]),
    )


def _area_row(
    name: str, own: np.ndarray, points: pd.DataFrame, clean: np.ndarray, robust: np.ndarray, front: np.ndarray
) -> dict[str, object]:
    area, whole = front_area(clean[:, own], robust[:, own]), front_area(clean, robust)
    gain = np.maximum(whole - front_area(clean[:, ~own], robust[:, ~own]), 0)  # rounding may pull it a hair below
    row: dict[str, object] = {"method": name, "settings": int(own.sum()), "n": int(points["n"][own].min())}
    for column, values, ends in (("area", area, ("low", "high")), ("gain", gain, ("gain_low", "gain_high"))):
        row[column] = float(values[0])
        row.update(zip(ends, map(float, interval(values[1:])), strict=True))
    return {**row, "share": _share(np.any(front[:, own], axis=1))}


def _stretches(points: pd.DataFrame, clean: np.ndarray, robust: np.ndarray) -> pd.DataFrame:
    method, strength, c, r = points["method"].to_numpy(), points["strength"].to_numpy(), clean[0], robust[0]
    corners = np.flatnonzero(points["on_front"])
    rows = []
    for k in corners[np.argsort(c[corners], kind="stable")]:
        reached = np.where(clean >= clean[:, k : k + 1], robust, -1.0)
        own = method == method[k]
        owns = reached[:, own].max(axis=1) >= reached[:, ~own].max(axis=1, initial=-1.0)
        start = c[corners][c[corners] < c[k]].max(initial=0.0)
        rows.append((start, c[k], r[k], method[k], strength[k], _share(owns)))
    return pd.DataFrame(rows, columns=["from", "to", "robust", "method", "strength", "share"])


def _share(events: np.ndarray) -> np.ndarray:
    """Return the share of the draws, over the first axis; its row 0 is the estimate and no draw."""
    return np.mean(events[1:], axis=0) if len(events) > 1 else np.full(events.shape[1:], np.nan)[()]


def claims(areas: pd.DataFrame, dominance: pd.DataFrame) -> pd.DataFrame:
    """Call each method ``"on the front"``, ``"dominated"`` or ``"undecided"``, one row each, and say it in a sentence.

    The rule: on the front where the method has a point on the front in at least 95 % of the bootstraps, dominated where
    it has one in at most 5 %, undecided between and without bootstraps. A dominated method is dominated by those
    methods, not dominated themselves, of which each dominates all its points in at least 95 % of the bootstraps; where
    there is none, by several together: those that dominate one of its points in more than half of them.

    Args:
        areas, dominance: as in `TradeOff`.

    Returns:
        method, verdict, share (of the bootstraps with a point on the front), by (names with commas), words.

    Raises:
        UnmovedError: a column is missing.
    """
    require_columns(areas, ["method", "share"], "claims: areas", may_be_empty=True)
    require_columns(dominance, ["method", "by", "share", "any_share"], "claims: dominance", may_be_empty=True)
    shares = areas[areas["method"] != ALL].set_index("method")["share"]
    words = {method: _word(share) for method, share in shares.items()}
    rows = []
    for method, share in shares.items():
        rivals = dominance[(dominance["method"] == method) & (dominance["by"].map(words) != DOMINATED)]
        alone, some = (rivals.loc[held, "by"] for held in (rivals["share"] >= LEVEL, rivals["any_share"] > 0.5))
        by = ", ".join(alone if len(alone) else some) if words[method] == DOMINATED else ""
        rows.append((method, words[method], share, by, _sentence(str(method), words[method], share, by, len(alone))))
    return pd.DataFrame(rows, columns=["method", "verdict", "share", "by", "words"])


def _word(share: float) -> str:
    if share >= LEVEL:
        return ON_FRONT
    return DOMINATED if share <= 1 - LEVEL else UNDECIDED


def _sentence(method: str, word: str, share: float, by: str, alone: int) -> str:
    if math.isnan(share):
        return f"{method}: {word}, for without the answers image by image there is no interval."
    how = "all" if share == 1 else "none" if share == 0 else f"{100 * share:.1f} %"
    seen = f"it has a point on the front in {how} of the bootstraps"
    if word == DOMINATED:
        return f"{method} is {word} {'by' if alone else 'together by'} {by}: {seen}."
    return f"{method} is {word}: {seen}." if word == ON_FRONT else f"{method}: {word}, {seen}."
