"""Bias and variance of a risk over models that were trained on disjoint parts of the data.

Each model k gives probabilities p_k; for the adversarial risk, those of the image attacked against model k itself. The
identities stay exact, since an attacked model is just another random function.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from unmoved.errors import UnmovedError, require_choice
from unmoved.protocols import Label

CORRECTIONS = ("plug-in", "k/(k-1)", "jackknife")


@dataclass(frozen=True)
class Decomposition:
    """Means over samples: ``risk = bias + variance``; for the squared error ``bias`` is the squared bias."""

    risk: float
    bias: float
    variance: float


def decompose_mse(p: Tensor, y: Label) -> Decomposition:
    """Squared error: ``Var = k/(k-1) mean_x (1/k) sum_k ||p_k - pbar||^2``, ``Bias^2 = Risk - Var``, both unbiased.

    Yang et al. 2020 (arXiv 2002.11328), with the adversarial version of Yu et al. 2021 (arXiv 2103.09947).

    Args:
        p: (k, N, K) probabilities of k models.
        y: (N,) int64 labels.

    Raises:
        UnmovedError: fewer than two models, shapes that do not fit, or values that are no probabilities.
    """
    p = _checked(p, y)
    k, mean = len(p), p.mean(dim=0)
    target = F.one_hot(y, p.shape[2]).to(p.dtype)
    risk = float(((p - target) ** 2).sum(dim=2).mean())
    variance = k / (k - 1) * float(((p - mean) ** 2).sum(dim=2).mean())
    return Decomposition(risk, risk - variance, variance)


def decompose_kl(p: Tensor, y: Label, correction: str = "plug-in") -> Decomposition:
    """Cross-entropy: ``pi ~ exp(mean_k log p_k)``, ``Bias = -log pi_y``, ``Var = mean_k KL(pi || p_k) = -log Z``.

    The plug-in variance is biased low (about half at k = 2); ``"k/(k-1)"`` and ``"jackknife"`` correct it, and the bias
    is then the risk minus the corrected variance. No unbiased estimator is known to us.

    Args:
        p, y: as `decompose_mse`; p must be positive.
        correction: ``"plug-in"``, ``"k/(k-1)"`` or ``"jackknife"`` over the models.

    Raises:
        UnmovedError: as `decompose_mse`; an unknown correction; a probability of zero.
    """
    require_choice("correction", correction, CORRECTIONS)
    p = _checked(p, y)
    if not (p > 0).all():
        raise UnmovedError("decompose_kl: expected positive probabilities, came 0; compute them in float64 from logits")
    log_p = p.log()
    k = len(p)
    risk = float(-log_p.gather(2, y.expand(k, -1)[:, :, None]).mean())
    variance = _minus_log_z(log_p)
    if correction == "k/(k-1)":
        variance *= k / (k - 1)
    elif correction == "jackknife":
        left_out = [_minus_log_z(torch.cat([log_p[:i], log_p[i + 1 :]])) for i in range(k)]
        variance = k * variance - (k - 1) * sum(left_out) / k
    return Decomposition(risk, risk - variance, variance)


def _minus_log_z(log_p: Tensor) -> float:
    """``mean_x -log sum_c exp(mean_k log p_{k,c})``: zero for one model."""
    return float(-torch.logsumexp(log_p.mean(dim=0), dim=1).mean())


def _checked(p: Tensor, y: Label) -> Tensor:
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
