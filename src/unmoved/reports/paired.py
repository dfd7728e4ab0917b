"""Compare a method with its base: the difference in accuracy on the same images, with its interval and a verdict."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

import numpy as np
import pandas as pd

from unmoved.evaluation import outcomes
from unmoved.evaluation.outcomes import CLEAN, WORST
from unmoved.runs.accuracy import across
from unmoved.runs.by_recipe import RecipeResult
from unmoved.runs.evaluated import require_same_samples

# Below this accuracy a difference may be real, but is of no use.
NEXT_TO_NOTHING = 0.05
_by_sample = partial(outcomes.by_sample, is_checked=True)
COLUMNS = ("recipe", "conclusion", "beside", "clean", "robust", "n", "seeds")


def difference(
    ours: Sequence[pd.DataFrame], theirs: Sequence[pd.DataFrame], measure: str
) -> tuple[float, float, float]:
    """Compute the mean paired difference of accuracy with a 95 % interval over samples: (mean, low, high).

    ``d_i = mean over seeds of (ours right on i) - (theirs right on i)``; ``mean d -+ 1.96 sd(d) / sqrt(n)``. The
    interval is over test images; it says nothing about other seeds.

    Args:
        ours, theirs: outcomes of the same seeds on the same samples, as they were read.
        measure: ``"clean"``, an attack's name or ``"worst case"``.

    Raises:
        UnmovedError: tables of different samples.
    """
    for table in (*ours, *theirs):
        require_same_samples(ours[0], table, ("the first run", "another one"))
    pairs = [
        _by_sample(a).set_index("index")[measure].astype(float)
        - _by_sample(b).set_index("index")[measure].astype(float)
        for a, b in zip(ours, theirs, strict=True)
    ]
    d = pd.concat(pairs, axis=1).mean(axis=1).to_numpy()
    half = 1.96 * float(d.std(ddof=1)) / math.sqrt(len(d)) if len(d) > 1 else math.inf
    mean = float(d.mean())
    return mean, mean - half, mean + half


def beside(results: Sequence[RecipeResult]) -> pd.DataFrame:
    """Make one row per recipe whose ``base`` is in the same report: accuracies, differences, and whether it helps.

    Seeds that both have are compared; the columns are `COLUMNS`, as text. If AutoAttack has judged both, a column
    ``AutoAttack`` compares them on the images and seeds that it judged in both. A sampled verdict does not say which
    images it leaves, so then the column shows both figures, each with its own interval.
    """
    by_name = {result.name: result for result in results}
    rows: list[dict[str, object]] = []
    for result in results:
        base = by_name.get(str(result.runs[0].recipe.get("base")))
        if base is None or base is result:
            continue
        ours, theirs = ({run.seed: run.outcomes for run in v.runs} for v in (result, base))
        seeds = sorted(ours.keys() & theirs.keys())
        if not seeds:
            continue
        cells: dict[str, object] = {"recipe": result.name, "beside": base.name, "seeds": len(seeds)}
        tables = [ours[s] for s in seeds], [theirs[s] for s in seeds]
        compared = {column: _compared(*tables, measure) for column, measure in (("clean", CLEAN), ("robust", WORST))}
        settled = _settled(result, base)
        if settled is not None:
            cell, words = _compared(*settled, WORST)
            cell += f", n = {settled[0][0]['index'].nunique()}"
            if len(settled[0]) < len(seeds):
                cell += f", {len(settled[0])} of {len(seeds)} seeds"
            compared["AutoAttack"] = cell, words
        elif (unpaired := _unpaired(result, base)) is not None:
            compared["AutoAttack"] = unpaired
        cells |= {column: cell for column, (cell, _) in compared.items()}
        cells["n"] = result.runs[0].setting.n
        cells["conclusion"] = "; ".join(f"{name}: {words}" for name, (_, words) in compared.items())
        rows.append(cells)
    columns = list(COLUMNS)
    if any("AutoAttack" in cells for cells in rows):
        columns.insert(columns.index("robust") + 1, "AutoAttack")
    return pd.DataFrame(rows, columns=columns).fillna("-")


def _compared(ours: Sequence[pd.DataFrame], theirs: Sequence[pd.DataFrame], measure: str) -> tuple[str, str]:
    """Return (accuracy and difference with its interval, the verdict in a word)."""
    levels = np.array([[_by_sample(table)[measure].mean() for table in side] for side in (ours, theirs)])
    mean, low, high = difference(ours, theirs, measure)
    cell = f"{100 * levels[0].mean():.1f} ({100 * mean:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}])"
    nothing = bool(levels.mean(axis=1).max() < NEXT_TO_NOTHING)
    return cell, "next to nothing either way" if nothing else _words(low, high, levels[0] - levels[1])


def _settled(result: RecipeResult, base: RecipeResult) -> tuple[list[pd.DataFrame], list[pd.DataFrame]] | None:
    """Return AutoAttack's outcomes of the seeds and images that it judged in both; None if there are none.

    None, too, if its versions differ, or if the column robust shows these outcomes already.
    """
    ours, theirs = (
        {run.seed: run.autoattack for run in v.settled if run.autoattack is not None} for v in (result, base)
    )
    pairs = [(ours[s], theirs[s]) for s in sorted(ours.keys() & theirs.keys())]
    common = [set(a["index"]) & set(b["index"]) for a, b in pairs]
    shared = set.intersection(*common) if common else set()
    same = all(run.outcomes is run.autoattack for run in (*result.runs, *base.runs))
    if not shared or same or result.versions != base.versions:
        return None
    tables = [[side[side["index"].isin(shared)] for side in pair] for pair in pairs]
    return [a for a, _ in tables], [b for _, b in tables]


def _unpaired(result: RecipeResult, base: RecipeResult) -> tuple[str, str] | None:
    """Return (both figures of AutoAttack, one of them sampled, with their intervals; how these lie); None without."""
    ours, theirs = (v.autoattack_by_seed for v in (result, base))
    seeds = sorted(ours.keys() & theirs.keys())
    is_sampled = any(run.estimate is not None and run.seed in seeds for run in (*result.runs, *base.runs))
    if not is_sampled or result.versions != base.versions:
        return None
    one, other = (across([side[seed] for seed in seeds]) for side in (ours, theirs))
    cells = [f"{100 * row.accuracy:.1f} [{100 * row.low:.1f}, {100 * row.high:.1f}]" for row in (one, other)]
    lie = "overlap" if max(one.low, other.low) <= min(one.high, other.high) else "are apart"
    return f"{cells[0]} beside {cells[1]}, sampled", f"sampled, the intervals {lie}"


def _words(low: float, high: float, by_seed: np.ndarray) -> str:
    """Say that it helps or hurts only if the interval over images leaves out zero and every seed agrees."""
    if low > 0 and (by_seed > 0).all():
        return "helps"
    return "hurts" if high < 0 and (by_seed < 0).all() else "no difference shown"
