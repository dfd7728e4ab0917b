"""Which methods are worth their price, in words."""

from __future__ import annotations

import math

import pandas as pd

from unmoved.analyses.association import LEVEL
from unmoved.analyses.pareto import ALL
from unmoved.core.errors import require_columns


def verdict(areas: pd.DataFrame, dominance: pd.DataFrame) -> pd.DataFrame:
    """One row a method: ``"on the front"``, ``"dominated"`` or ``"undecided"``, and the sentence that says it.

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
    require_columns(areas, ["method", "share"], "verdict: areas", may_be_empty=True)
    require_columns(dominance, ["method", "by", "share", "any_share"], "verdict: dominance", may_be_empty=True)
    shares = areas[areas["method"] != ALL].set_index("method")["share"]
    words = {method: _word(share) for method, share in shares.items()}
    rows = []
    for method, share in shares.items():
        rivals = dominance[(dominance["method"] == method) & (dominance["by"].map(words) != "dominated")]
        alone, some = (rivals.loc[held, "by"] for held in (rivals["share"] >= LEVEL, rivals["any_share"] > 0.5))
        by = ", ".join(alone if len(alone) else some) if words[method] == "dominated" else ""
        rows.append((method, words[method], share, by, _sentence(str(method), words[method], share, by, len(alone))))
    return pd.DataFrame(rows, columns=["method", "verdict", "share", "by", "words"])


def _word(share: float) -> str:
    if share >= LEVEL:
        return "on the front"
    return "dominated" if share <= 1 - LEVEL else "undecided"


def _sentence(method: str, word: str, share: float, by: str, alone: int) -> str:
    if math.isnan(share):
        return f"{method}: undecided, for without the answers image by image there is no interval."
    how = "all" if share == 1 else "none" if share == 0 else f"{100 * share:.1f} %"
    seen = f"it has a point on the front in {how} of the bootstraps"
    if word == "dominated":
        return f"{method} is dominated {'by' if alone else 'together by'} {by}: {seen}."
    return f"{method} is on the front: {seen}." if word == "on the front" else f"{method}: undecided, {seen}."
