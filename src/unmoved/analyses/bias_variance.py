"""Decompose a risk into bias and variance over models that were trained on disjoint parts of the data.

Each model k gives probabilities p_k; for the adversarial risk, those of the image attacked against model k itself. The
identities stay exact, since an attacked model is just another random function.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from torch.nn import functional as F

from unmoved.analyses.association import bootstrap_means, interval
from unmoved.core.batch import Label
from unmoved.core.errors import UnmovedError, require_choice

CORRECTIONS = ("plug-in", "k/(k-1)", "jackknife")
LOSSES = ("squared error", "KL")
MEASURES = ("risk", "bias", "variance")


@dataclass(frozen=True)
class Decomposition:
    """Hold means over samples: ``risk = bias + variance``; for the squared error ``bias`` is the squared bias."""

    risk: float
    bias: float
    variance: float


def decompose_mse(p: Tensor, y: Label) -> Decomposition:
    """Decompose the squared error: ``Var = k/(k-1) mean_x (1/k) sum_k ||p_k - pbar||^2``, ``Bias^2 = Risk - Var``.

    Both are unbiased. Yang et al. 2020 (arXiv 2002.11328), with the adversarial version of Yu et al. 2021 (arXiv
    2103.09947).

    Args:
        p: (k, N, K) probabilities of k models.
        y: (N,) int64 labels.

    Raises:
        UnmovedError: fewer than two models, shapes that do not fit, or values that are no probabilities.
    """
    risk, variance = _squared_error(checked(p, y), y)
    return _means(risk, _corrected(variance, len(p)))


def decompose_kl(p: Tensor, y: Label, correction: str = "plug-in") -> Decomposition:
    """Decompose cross-entropy: ``Bias = -log pi_y``, ``Var = mean_k KL(pi || p_k) = -log Z``.

    ``pi = exp(mean_k log p_k) / Z``. The plug-in variance is biased low (about half at k = 2); ``"k/(k-1)"`` and
    ``"jackknife"`` correct it, and the bias
    is then the risk minus the corrected variance. No unbiased estimator is known to us.

    Args:
        p, y: as `decompose_mse`; p must be positive.
        correction: ``"plug-in"``, ``"k/(k-1)"`` or ``"jackknife"`` over the models.

    Raises:
        UnmovedError: as `decompose_mse`; an unknown correction; a probability of zero.
    """
    require_choice("correction", correction, CORRECTIONS)
    risk, variances = _cross_entropy(checked(p, y), y)
    return _means(risk, variances[correction])


def table(
    p: Tensor,
    y: Label,
    classes: bool = True,
    *,
    losses: Sequence[str] = LOSSES,
    bootstraps: int = 1000,
    seed: int = 0,
) -> pd.DataFrame:
    """Tabulate both decompositions under each correction, overall and per class, with intervals over the test images.

    The squared error stands as ``"plug-in"`` (``V_plug = mean_k ||p_k - pbar||^2``, whose bias is exactly
    ``||pbar - e||^2``) and ``"k/(k-1)"``, which the jackknife over models equals exactly; KL also as ``"jackknife"``.
    Each row has ``risk = bias + variance``. Everything is a mean of contributions of single images, so the rows of the
    classes weighted by n give the overall row. The intervals are 95 % percentile intervals of a bootstrap over the
    images (of a class, in its row) for the models at hand; how much other splits would change, `merge` says.

    Args:
        p: (k, N, K) probabilities of k models; for the adversarial risk, of the images attacked against each model
            itself, or one perturbation shown to all (shared), or one made against `committee.joint` (joint).
        y: (N,) int64 labels.
        classes: also one row for each class that occurs.
        losses: ``"squared error"`` and ``"KL"``, or one of them (KL needs positive probabilities).
        bootstraps: draws of the images; 0 gives NaN for the intervals.
        seed: of the draws; the same for tables that are compared.

    Returns:
        loss, correction, class (-1 for all), k, n, and risk, bias, variance, each also as _low and _high.

    Raises:
        UnmovedError: as `decompose_mse`, and for KL as `decompose_kl`; an unknown loss.
    """
    for loss in losses:
        require_choice("loss", loss, LOSSES)
    p, k = checked(p, y).cpu(), len(p)
    y = y.cpu()
    kinds: list[tuple[str, str, Tensor, Tensor]] = []
    if "squared error" in losses:
        risk, plug_in = _squared_error(p, y)
        kinds += [(LOSSES[0], CORRECTIONS[0], risk, plug_in), (LOSSES[0], CORRECTIONS[1], risk, _corrected(plug_in, k))]
    if "KL" in losses:
        risk, variances = _cross_entropy(p, y)
        kinds += [(LOSSES[1], name, risk, variances[name]) for name in CORRECTIONS]
    values = torch.stack([part for *_, risk, variance in kinds for part in (risk, variance)], dim=1).numpy()
    rows = []
    for label in [-1, *(torch.unique(y).tolist() if classes else [])]:
        samples = values if label == -1 else values[(y == label).numpy()]
        draws = np.concatenate([samples.mean(axis=0)[None], bootstrap_means(samples, bootstraps, seed)])
        for place, (loss, correction, *_) in enumerate(kinds):
            r, v = draws[:, 2 * place], draws[:, 2 * place + 1]
            row = {"loss": loss, "correction": correction, "class": label, "k": k, "n": len(samples)}
            for name, series in zip(MEASURES, (r, r - v, v), strict=True):
                low, high = interval(series[1:])
                row |= {name: series[0], f"{name}_low": float(low), f"{name}_high": float(high)}
            rows.append(row)
    return pd.DataFrame(rows)


def merge(tables: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """Average over permutations: each table comes from another split of the training set into k disjoint parts.

    Rows are matched by every column that is no result (loss, correction, class, k, and what was added to them, such as
    the training eps). ``_low`` and ``_high`` are the means of the permutations' ends: the permutations share the test
    images, so the interval of the mean is about that wide at most. ``_std`` is the spread over permutations (divisor
    one less than their number; NaN for one): what another split would change.

    Returns:
        The columns of `table`, then permutations, risk_std, bias_std, variance_std.

    Raises:
        UnmovedError: no table, or a row that not every table has exactly once.
    """
    if not tables:
        raise UnmovedError("merge: expected the table of at least one permutation, came none")
    results = [f"{name}{end}" for name in MEASURES for end in ("", "_low", "_high")]
    keys = [name for name in tables[0].columns if name not in (*results, "n")]
    for one in tables:
        if list(one.columns) != list(tables[0].columns) or not set(results) <= set(one.columns):
            raise UnmovedError(
                f"merge: expected tables of the same columns, as `table` makes them, came {list(one.columns)} beside "
                f"{list(tables[0].columns)}"
            )
    stacked = pd.concat([one.assign(permutations=number) for number, one in enumerate(tables)], ignore_index=True)
    groups = stacked.groupby(keys, sort=False, dropna=False)
    times = groups["permutations"].transform("size"), groups["permutations"].transform("nunique")
    odd = stacked[(times[0] != len(tables)) | (times[1] != len(tables))]
    if len(odd):
        raise UnmovedError(
            f"merge: expected each row once in each of {len(tables)} tables, but not so {odd[keys].iloc[0].to_dict()}; "
            "decompose all permutations alike"
        )
    merged = groups.agg({"n": "min", **dict.fromkeys(results, "mean")})
    merged["permutations"] = groups.size()
    for name in MEASURES:
        merged[f"{name}_std"] = groups[name].std()
    return merged.reset_index()


def _means(risk: Tensor, variance: Tensor) -> Decomposition:
    mean_risk, mean_variance = float(risk.mean()), float(variance.mean())
    return Decomposition(mean_risk, mean_risk - mean_variance, mean_variance)


def _corrected(variance: Tensor, k: int) -> Tensor:
    return k / (k - 1) * variance


def _squared_error(p: Tensor, y: Label) -> tuple[Tensor, Tensor]:
    """Return the risk and plug-in variance of each image, (N,) each."""
    target = F.one_hot(y, p.shape[2]).to(p.dtype)
    risk = ((p - target) ** 2).sum(dim=2).mean(dim=0)
    return risk, ((p - p.mean(dim=0)) ** 2).sum(dim=2).mean(dim=0)


def _cross_entropy(p: Tensor, y: Label) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the risk of each image, (N,), and its variance under each correction."""
    if not (p > 0).all():
        raise UnmovedError("decompose_kl: expected positive probabilities, came 0; compute them in float64 from logits")
    log_p, k = p.log(), len(p)
    risk = -log_p.gather(2, y.expand(k, -1)[:, :, None]).squeeze(2).mean(dim=0)
    total = log_p.sum(dim=0)
    plug_in = _minus_log_z(total / k)
    left_out = _minus_log_z((total - log_p) / (k - 1))  # row i: without model i
    jackknife = k * plug_in - (k - 1) * left_out.mean(dim=0)
    return risk, dict(zip(CORRECTIONS, (plug_in, _corrected(plug_in, k), jackknife), strict=True))


def _minus_log_z(mean_log_p: Tensor) -> Tensor:
    """Return ``-log sum_c exp(mean_k log p_{k,c})`` over the last axis: zero for one model."""
    return -torch.logsumexp(mean_log_p, dim=-1)


def checked(p: Tensor, y: Label) -> Tensor:
    """Return p (k, N, K) in float64; raise `UnmovedError` where it is no probability or does not fit y (N,)."""
    if p.ndim != 3 or y.ndim != 1 or p.shape[1] != len(y):
        raise UnmovedError(
            f"decompose: expected p (k, N, K) and y (N,), came p {tuple(p.shape)} and y {tuple(y.shape)}"
        )
    if len(p) < 2:
        raise UnmovedError(f"decompose: expected at least 2 models, came {len(p)}; one model has no variance")
    p = p.double()
    if not torch.isfinite(p).all() or (p < 0).any() or ((p.sum(dim=2) - 1).abs() > 1e-4).any():
        raise UnmovedError("decompose: expected probabilities that sum to 1, came something else; apply a softmax")
    if len(y) == 0 or int(y.min()) < 0 or int(y.max()) >= p.shape[2]:
        raise UnmovedError(f"decompose: expected labels 0..{p.shape[2] - 1} of at least one sample")
    return p
