"""Decompositions: the notes' vectors, exact identities, and Monte-Carlo truth."""

from __future__ import annotations

import pytest
import torch

from unmoved.analyses.bias_variance import decompose_kl, decompose_mse
from unmoved.core.errors import UnmovedError

P = torch.tensor([[[0.7, 0.2, 0.1]], [[0.5, 0.3, 0.2]]], dtype=torch.float64)
Y = torch.tensor([0])


def test_vectors_of_the_notes():
    """bias-variance.md 4.1 and 4.2."""
    mse = decompose_mse(P, Y)
    assert (mse.risk, mse.variance, mse.bias) == pytest.approx((0.26, 0.03, 0.23))
    kl = decompose_kl(P, Y)
    assert (kl.risk, kl.bias, kl.variance) == pytest.approx((0.524911, 0.502643, 0.022268), abs=1e-6)


def models(k, n, draw, spread=1.0):
    """k independent models on n samples of a synthetic population: logits = mean + noise."""
    mean = torch.tensor([1.0, 0.0, -0.5, 0.3], dtype=torch.float64)
    return torch.softmax(mean + spread * torch.randn(k, n, 4, generator=draw, dtype=torch.float64), dim=2)


def test_mse_is_unbiased():
    """Within three standard errors of the truth for k = 2, 3, 5; the plug-in would be low by (k-1)/k."""
    draw = torch.Generator().manual_seed(0)
    y = torch.zeros(1, dtype=torch.long)
    truth = decompose_mse(models(200_000, 1, draw), y)
    for k in (2, 3, 5):
        estimates = torch.tensor([decompose_mse(models(k, 50, draw), y.expand(50)).variance for _ in range(200)])
        error = estimates.std() / len(estimates) ** 0.5
        assert abs(estimates.mean() - truth.variance) < 3 * error
        assert abs(estimates.mean() * (k - 1) / k - truth.variance) > 3 * error


def test_kl_plug_in_is_low_and_the_corrections_come_close():
    draw = torch.Generator().manual_seed(1)
    y = torch.zeros(2000, dtype=torch.long)
    truth = decompose_kl(models(50_000, 1, draw), y[:1]).variance
    for k in (2, 3, 5):
        p = models(k, 2000, draw)
        plug_in = decompose_kl(p, y).variance
        assert plug_in < 0.95 * truth * (1 - 0.5 / k)
        for correction in ("k/(k-1)", "jackknife"):
            corrected = decompose_kl(p, y, correction)
            assert abs(corrected.variance - truth) < min(0.25 * abs(plug_in - truth), 0.12 * truth)
            assert corrected.risk == pytest.approx(corrected.bias + corrected.variance)
    two = models(2, 100, draw)
    assert decompose_kl(two, y[:100], "jackknife").variance == pytest.approx(
        decompose_kl(two, y[:100], "k/(k-1)").variance
    )


def test_kl_variance_is_the_mean_divergence_from_the_geometric_mean():
    p = models(3, 20, torch.Generator().manual_seed(2))
    y = torch.arange(20) % 4
    pi = p.log().mean(0).exp()
    pi = pi / pi.sum(1, keepdim=True)
    divergence = (pi * (pi.log() - p.log())).sum(2).mean()
    assert decompose_kl(p, y).variance == pytest.approx(divergence.item())
    assert decompose_kl(p, y).bias == pytest.approx(-pi[torch.arange(20), y].log().mean().item())


@pytest.mark.parametrize(
    ("p", "y", "message"),
    [
        (P[:1], Y, "at least 2 models, came 1"),
        (P[0], Y, r"expected p \(k, N, K\)"),
        (P * 2, Y, "sum to 1"),
        (P, torch.tensor([3]), "labels 0..2"),
    ],
)
def test_bad_input(p, y, message):
    for decompose in (decompose_mse, decompose_kl):
        with pytest.raises(UnmovedError, match=message):
            decompose(p, y)


def test_zero_probabilities_have_no_logarithm():
    p = torch.tensor([[[1.0, 0.0]], [[0.5, 0.5]]])
    assert decompose_mse(p, Y).risk == pytest.approx(0.25)
    with pytest.raises(UnmovedError, match="positive"):
        decompose_kl(p, Y)
    with pytest.raises(UnmovedError, match="correction"):
        decompose_kl(P, Y, "none")
