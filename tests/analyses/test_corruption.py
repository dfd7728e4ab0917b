"""The geometry of weight corruption: closed forms against brute force."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from unmoved.core.errors import UnmovedError
from unmoved.core.weights import project, steepest

DRAW = torch.Generator().manual_seed(0)


def random(*shape):
    return torch.randn(*shape, generator=DRAW, dtype=torch.float64)


@pytest.mark.parametrize("p", [1.25, 1.5, 2, 3, 8, math.inf])
@pytest.mark.parametrize("n", [None, 3])
def test_steepest_reaches_the_dual_norm_and_nothing_beats_it(p, n):
    """apd.md 1.5: the gain is eps ||h||_q with h the n largest entries."""
    for _ in range(20):
        g = random(6)
        a = steepest(g, 0.7, p, n)
        assert torch.linalg.vector_norm(a, ord=p) == pytest.approx(0.7)
        assert n is None or (a != 0).sum() <= n
        h = g.abs().sort(descending=True).values[: n or 6]
        q = 1.0 if p == math.inf else p / (p - 1)
        assert (a * g).sum() == pytest.approx(0.7 * torch.linalg.vector_norm(h, ord=q).item())
        for _ in range(50):
            support = torch.randperm(6, generator=DRAW)[: n or 6]
            other = torch.zeros(6, dtype=torch.float64).index_copy(0, support, random(len(support)))
            other = 0.7 * other / torch.linalg.vector_norm(other, ord=p)
            assert (other * g).sum() <= (a * g).sum() + 1e-9


@pytest.mark.parametrize("p", [2, math.inf])
@pytest.mark.parametrize("n", [None, 1, 2, 4])
def test_project_is_the_nearest_point(p, n):
    """apd.md 1.6: top-n, then the norm, is exact: against every support of n entries."""
    for _ in range(50):
        a = random(4)
        ours = project(a, 0.8, p, n)
        assert torch.linalg.vector_norm(ours, ord=p) <= 0.8 + 1e-12
        best = math.inf
        for support in itertools.combinations(range(4), n or 4):
            part = torch.zeros(4, dtype=torch.float64)
            part[list(support)] = a[list(support)]
            length = torch.linalg.vector_norm(part)
            part = part.clamp(-0.8, 0.8) if p == math.inf else part * min(1.0, 0.8 / length.item())
            best = min(best, torch.linalg.vector_norm(part - a).item())
        assert torch.linalg.vector_norm(ours - a).item() == pytest.approx(best)
        assert torch.allclose(project(ours, 0.8, p, n), ours)


def test_lists_are_one_vector():
    parts = [random(2, 3), random(4), random(1, 1, 2)]
    whole = torch.cat([t.flatten() for t in parts])
    for function in (
        lambda t: steepest(t, 0.3, 2, 5),
        lambda t: project(t, 0.3, math.inf, 5),
        lambda t: steepest(t, 0.3, 3),
    ):
        split = function(parts)
        assert [t.shape for t in split] == [t.shape for t in parts]
        assert torch.allclose(torch.cat([t.flatten() for t in split]), function(whole))
    assert steepest(parts[0], 0.3).shape == (2, 3)


def test_zero_and_extreme_gradients():
    zero = torch.zeros(3)
    for p in (1.5, 2, math.inf):
        assert torch.equal(steepest(zero, 1.0, p), zero)
        for scale in (1e-30, 1e30):
            a = steepest(torch.tensor([3.0, -4.0, 0.0]) * scale, 1.0, p)
            assert torch.isfinite(a).all()
            assert torch.linalg.vector_norm(a, ord=p) == pytest.approx(1.0, rel=1e-5)
    assert steepest(torch.tensor([2.0, 0.0]), 1.0, math.inf).tolist() == [1.0, 0.0]
    assert torch.equal(project(zero, 0.0), zero)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: steepest(torch.ones(3), -1.0), "eps"),
        (lambda: steepest(torch.ones(3), 1.0, 1.0), r"p in \(1, inf\], came 1.0"),
        (lambda: steepest(torch.ones(3), 1.0, 2, 4), r"n: expected a whole number >= 1 and <= 3, came 4"),
        (lambda: project(torch.ones(3), 1.0, 2, 0), "n: expected"),
        (lambda: project(torch.ones(3), 1.0, 3), "p = 2 and p = inf, came 3"),
    ],
)
def test_bad_settings(call, message):
    with pytest.raises(UnmovedError, match=message):
        call()
