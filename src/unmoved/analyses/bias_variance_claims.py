"""Judge the claims of Yu et al. 2021 (arXiv 2103.09947) about bias and variance on a table of decompositions."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
import scipy  # its parts load where they are used: a second that no worker waits for

from unmoved.analyses.association import CONFIRMED, LEVEL, REFUTED, UNDECIDED, percentiles, rank_correlations
from unmoved.analyses.bias_variance import MEASURES
from unmoved.core.errors import UnmovedError, require_columns, require_whole

RISES, DOMINATES, UNIMODAL = "the bias rises", "the bias dominates the variance", "the variance is unimodal"
DRAWS = 2000


def claims(table: pd.DataFrame, by: Sequence[str] = (), *, seed: int = 0) -> pd.DataFrame:
    """Call three claims about the training eps ``"confirmed"``, ``"refuted"`` or ``"undecided"``.

    The claims are the paper's findings, the rules our own choice [S]. An interval lies below another where its upper
    end is below the other's lower one. The rows of different eps are treated as independent although they share the
    test images, which is cautious. Where there are P > 1 permutations, each half h of an interval becomes
    ``sqrt(h^2 + (t std)^2 / P)`` with Student's t of P - 1; with one, nothing is said of other splits.

    - The bias rises: refuted where the bias of a larger eps lies below that of a smaller one; confirmed where it does
      not, that of the largest eps lies above that of the smallest, and Spearman's correlation of eps and bias is above
      zero with its whole 95 % interval (bias redrawn 2000 times, normal with its interval); value: that correlation.
    - The bias dominates: confirmed where it lies above the variance at every eps, refuted where it lies below at one;
      value: the smallest bias / risk.
    - The variance is unimodal: refuted where it lies, at some eps, below that of one smaller and one larger eps;
      confirmed where it is not and, at an eps between, it lies above both the first and the last; undecided too where
      it only rises or falls, since the peak may be outside; value: the eps of the largest variance.

    The first and the last need three eps. Every plug-in variance is low, so read the corrected rows. The models saw n/k
    samples each, so all holds for training sets of that size.

    Args:
        table: rows of `table` or `merge`, one below the other, with the column train_eps; rows of classes are left out.
        by: columns to be judged apart besides loss and correction; "eval_eps" and "mode" are added where present.
        seed: of the redrawn biases.

    Returns:
        loss, correction, the columns of ``by``, claim, verdict, value, words.

    Raises:
        UnmovedError: a missing column, no overall row, or two rows of one train_eps.
    """
    wanted = ["loss", "correction", "class", "train_eps", *(f"{m}{e}" for m in MEASURES for e in ("", "_low", "_high"))]
    require_columns(table, (*wanted, *by), "claims")
    if not (table["class"] == -1).any():
        raise UnmovedError("claims: expected decompositions of all images, came no row of class -1; pass whole tables")
    by = [*by, *(name for name in ("eval_eps", "mode") if name in table.columns and name not in by)]
    keys, rows = ["loss", "correction", *by], []
    for key, some in table[table["class"] == -1].groupby(keys, sort=False, dropna=False):
        if some["train_eps"].duplicated().any():
            twice = some.loc[some["train_eps"].duplicated(), "train_eps"].iloc[0]
            raise UnmovedError(
                f"claims: expected one row a training eps for {dict(zip(keys, key, strict=True))}, came several of "
                f"{twice:g}; merge permutations first, and name in `by` what else differs"
            )
        some = some.sort_values("train_eps")
        for claim, judge in ((RISES, _rises), (DOMINATES, _dominates), (UNIMODAL, _unimodal)):
            word, value, words = judge(some, seed)
            rows.append((*key, claim, word, value, f"{claim}: {word}; {words}"))
    return pd.DataFrame(rows, columns=[*keys, "claim", "verdict", "value", "words"])


def _ends(rows: pd.DataFrame, name: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return middle, low and high, widened by what the permutations say."""
    middle, low, high = (rows[f"{name}{end}"].to_numpy(float) for end in ("", "_low", "_high"))
    if f"{name}_std" not in rows:
        return middle, low, high
    count = rows["permutations"].to_numpy(float)
    share = (
        scipy.stats.t.ppf((1 + LEVEL) / 2, np.maximum(count - 1, 1))
        * rows[f"{name}_std"].to_numpy(float)
        / np.sqrt(count)
    )
    share = np.where(count > 1, share, 0.0)
    return middle, middle - np.hypot(middle - low, share), middle + np.hypot(high - middle, share)


def _rises(rows: pd.DataFrame, seed: int) -> tuple[str, float, str]:
    middle, low, high = _ends(rows, "bias")
    if len(rows) < 3:
        return UNDECIDED, float("nan"), f"three training eps are needed, here are {len(rows)}"
    error = (high - low) / (2 * scipy.stats.norm.ppf((1 + LEVEL) / 2))
    draw = np.random.default_rng(require_whole("seed", seed, at_least=0))
    drawn = middle + error * draw.standard_normal((DRAWS, len(middle)))
    order = np.arange(len(middle))
    rhos = np.nan_to_num(rank_correlations(np.stack([middle, *drawn]), order))  # 0 where all are equal
    rho, (least, most) = float(rhos[0]), percentiles(rhos[1:])
    words = f"Spearman's correlation with the training eps is {rho:.2f} [{least:.2f}, {most:.2f}]"
    if any(high[j] < low[i] for i in range(len(low)) for j in range(i, len(low))):
        return REFUTED, rho, words + ", and a larger eps has a clearly smaller bias"
    if least > 0 and low[-1] > high[0]:
        return CONFIRMED, rho, words + ", and the largest eps has a clearly larger bias than the smallest"
    return UNDECIDED, rho, words


def _dominates(rows: pd.DataFrame, _: int) -> tuple[str, float, str]:
    (bias, low, high), (_variance, least, most) = _ends(rows, "bias"), _ends(rows, "variance")
    value = float((bias / rows["risk"].to_numpy(float)).min())
    words = f"its smallest share of the risk is {value:.2f}"
    if (low > most).all():
        return CONFIRMED, value, words
    return (REFUTED if (high < least).any() else UNDECIDED), value, words


def _unimodal(rows: pd.DataFrame, _: int) -> tuple[str, float, str]:
    middle, low, high = _ends(rows, "variance")
    peak = float(rows["train_eps"].iloc[int(np.argmax(middle))])
    words = f"it is largest at a training eps of {peak:g}"
    inside = range(1, len(low) - 1)
    if len(rows) < 3:
        return UNDECIDED, peak, f"three training eps are needed, here are {len(rows)}"
    if any(high[j] < min(low[:j].max(), low[j + 1 :].max()) for j in inside):
        return REFUTED, peak, words + ", with a clear valley between two higher places"
    if any(low[j] > max(high[0], high[-1]) for j in inside):
        return CONFIRMED, peak, words + ", clearly above both ends"
    return UNDECIDED, peak, words + "; no clear peak inside the measured range"
