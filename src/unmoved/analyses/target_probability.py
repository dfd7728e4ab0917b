"""Measure by class how high and how steady the probability of the true class is, as ProbsCut's analysis does."""

from __future__ import annotations

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from unmoved.analyses.association import bootstrap_means, interval
from unmoved.analyses.bias_variance import checked
from unmoved.core.batch import Label
from unmoved.core.errors import UnmovedError

PARTS = ("mean", "bias2", "between_models", "between_examples", "risk")


def target_probability(
    p: Tensor, y: Label, q: Tensor | None = None, *, bootstraps: int = 1000, seed: int = 0
) -> pd.DataFrame:
    """Split the risk of each class: ``mean (1 - P)^2 = (1 - m_c)^2 + between models + between examples``.

    ``P_{k,i} = p_{k,i,y_i}``, ``m_c = mean P``; between models ``k/(k-1) mean_i (1/k) sum_k (P_{k,i} - Pbar_i)^2`` (as
    the squared error, on one number); between examples ``mean_i (Pbar_i - m_c)^2`` less between models / k, so that the
    sum is exact; it may come out slightly negative. Reconstruction [R]: the release of ProbsCut does not say which
    spread its "variance" is.

    Args:
        p: (k, N, K) probabilities of k >= 2 models, clean or adversarial.
        y: (N,) int64 labels.
        q: (K,) learned expected probability of each class, or (k, K), of which the mean is shown; None shows NaN.
        bootstraps, seed: draws of the images of each class, for 95 % percentile intervals.

    Returns:
        One row a class that occurs: class, k, n, q, geometric (``exp mean log P``, where ProbsCut's learned q is drawn
        to), then mean, bias2, between_models, between_examples, risk, each also as _low and _high.

    Raises:
        UnmovedError: as `decompose_mse`; q of another shape or outside [0, 1].
    """
    p = checked(p, y).cpu()
    y, (k, n, num_classes) = y.cpu(), p.shape
    learned = _learned(q, k, num_classes)
    of_truth = p.gather(2, y.expand(k, n)[:, :, None]).squeeze(2)
    middle = of_truth.mean(dim=0)
    values = torch.stack([middle, middle**2, of_truth.var(dim=0, correction=1)], dim=1).numpy()
    geometric = of_truth.log().mean(dim=0)
    rows = []
    for label in torch.unique(y).tolist():
        of_class = y == label
        samples = values[of_class.numpy()]
        draws = np.concatenate([samples.mean(axis=0)[None], bootstrap_means(samples, bootstraps, seed)])
        mean, square, between_models = draws.T
        between_examples = square - mean**2 - between_models / k
        bias2 = (1 - mean) ** 2
        parts = (mean, bias2, between_models, between_examples, bias2 + between_models + between_examples)
        row = {
            "class": label,
            "k": k,
            "n": len(samples),
            "q": learned[label],
            "geometric": float(geometric[of_class].mean().exp()),
        }
        for name, series in zip(PARTS, parts, strict=True):
            low, high = interval(series[1:])
            row |= {name: series[0], f"{name}_low": float(low), f"{name}_high": float(high)}
        rows.append(row)
    return pd.DataFrame(rows)


def _learned(q: Tensor | None, k: int, num_classes: int) -> list[float]:
    if q is None:
        return [float("nan")] * num_classes
    if q.shape not in ((num_classes,), (k, num_classes)) or not ((q >= 0) & (q <= 1)).all():
        raise UnmovedError(
            f"target_probability: expected q ({num_classes},) or ({k}, {num_classes}) in [0, 1], "
            f"came {tuple(q.shape)}; pass GlobalProbability.q, not its theta"
        )
    return torch.as_tensor(q).detach().double().reshape(-1, num_classes).mean(dim=0).tolist()
