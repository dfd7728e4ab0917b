"""The way to a hyperplane within a box, against linear and nonlinear programming."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog, minimize

from unmoved.attacks.hyperplanes import dual_length, length, to_hyperplane
from unmoved.core.errors import UnmovedError

NORMS = ["linf", "l2", "l1"]


def problems(rows, d, seed, scale=1.0):
    """Points in the box, normals with zeros, ties and very unequal sizes, planes near, far and out of reach."""
    draw = torch.Generator().manual_seed(seed)
    z = torch.rand(rows, d, generator=draw, dtype=torch.float64)
    z[torch.rand(rows, d, generator=draw) < 0.3] = 0
    z[torch.rand(rows, d, generator=draw) < 0.1] = 1
    w = torch.randn(rows, d, generator=draw, dtype=torch.float64)
    w = w * torch.randn(rows, d, generator=draw, dtype=torch.float64).mul(2).exp()
    w[torch.rand(rows, d, generator=draw) < 0.2] = 0
    tied = torch.rand(rows, generator=draw) < 0.3
    w[tied] = w[tied].sign()
    reach = w.clamp_min(0).sum(1) - (w * z).sum(1)  # the most that <w, z> can rise by
    drop = w.clamp_max(0).sum(1) - (w * z).sum(1)
    share = torch.rand(rows, generator=draw, dtype=torch.float64) * 1.2
    up = torch.rand(rows, generator=draw) < 0.5
    excess = -share * torch.where(up, reach, drop)
    return z, w * scale, excess * scale


def reachable(z, w, excess):
    room = torch.where(-excess[:, None] * w > 0, 1 - z, z)
    return (w.abs() * room).sum(1) >= excess.abs()


def by_linear_programming(z, w, excess, norm):
    """min ||s|| s.t. <w, s> = -excess, 0 <= z + s <= 1, by HiGHS."""
    d = len(z)
    box = [(-a, 1 - a) for a in z]
    if norm == "linf":  # variables s and the bound t on all |s_i|
        cost = np.r_[np.zeros(d), 1]
        rows = np.block([[np.eye(d), -np.ones((d, 1))], [-np.eye(d), -np.ones((d, 1))]])
        found = linprog(cost, rows, np.zeros(2 * d), np.r_[w, 0][None], [-excess], [*box, (0, None)])
    else:  # s = p - q, both at least 0
        found = linprog(
            np.ones(2 * d), A_eq=np.r_[w, -w][None], b_eq=[-excess],
            bounds=[(0, b) for _, b in box] + [(0, -a) for a, _ in box],
        )  # fmt: skip
    return found.fun if found.success else None


@pytest.mark.parametrize("norm", ["linf", "l1"])
@pytest.mark.parametrize("d", [1, 2, 7, 20])
def test_is_as_short_as_linear_programming_finds(norm, d):
    z, w, excess = problems(40, d, seed=d)
    ours = length(to_hyperplane(z, w, excess, norm), norm)
    can = torch.nonzero(reachable(z, w, excess * (1 + 1e-9))).flatten().tolist()
    assert 15 < len(can) < 40
    for k in can:
        best = by_linear_programming(z[k].numpy(), w[k].numpy(), float(excess[k]), norm)
        assert float(ours[k]) == pytest.approx(best, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("d", [1, 2, 7, 20])
def test_l2_is_as_short_as_bisection_finds(d):
    """The optimum is clip(z - lam w) - z for some lam, and <w, that> falls as lam grows."""
    z, w, excess = problems(200, d, seed=d)
    low, high = torch.full_like(excess, -1e9), torch.full_like(excess, 1e9)

    def moved(lam):
        return (z - lam[:, None] * w).clamp(0, 1) - z

    for _ in range(200):
        lam = (low + high) / 2
        above = excess + (w * moved(lam)).sum(1) > 0
        low, high = torch.where(above, lam, low), torch.where(above, high, lam)
    # Of the values of lam that end in the same point the one nearest to 0 is not known: with w = 0 none moves.
    can = reachable(z, w, excess * (1 + 1e-9)) & (w != 0).any(1)
    assert 100 < can.sum() < 200
    ours = to_hyperplane(z, w, excess, "l2")
    assert torch.allclose(length(ours, "l2")[can], length(moved(high), "l2")[can], rtol=1e-6, atol=1e-9)
    assert torch.allclose(ours[can], moved(high)[can], atol=1e-6)


def test_l2_is_as_short_as_a_general_solver_finds():
    z, w, excess = problems(12, 5, seed=5)
    step = to_hyperplane(z, w, excess, "l2")
    for k in torch.nonzero(reachable(z, w, excess * 1.01)).flatten():
        a, b, c = z[k].numpy(), w[k].numpy(), float(excess[k])
        plane = {"type": "eq", "fun": lambda s, b=b, c=c: b @ s + c, "jac": lambda s, b=b: b}
        found = minimize(
            lambda s: s @ s, np.zeros(5), jac=lambda s: 2 * s, bounds=list(zip(-a, 1 - a, strict=True)),
            constraints=plane, method="SLSQP", options={"ftol": 1e-14, "maxiter": 500},
        )  # fmt: skip
        if found.success:
            assert float(step[k] @ step[k]) == pytest.approx(found.fun, rel=1e-5, abs=1e-9)


@pytest.mark.parametrize("norm", NORMS)
@given(st.integers(0, 2**32), st.integers(1, 60), st.sampled_from([1e-26, 1.0, 1e12]))
@settings(max_examples=60, deadline=None)
def test_is_on_the_plane_or_in_the_nearest_corner(norm, seed, d, scale):
    z, w, excess = problems(8, d, seed, scale)
    step = to_hyperplane(z, w, excess, norm)
    assert ((z + step) >= -1e-12).all()
    assert ((z + step) <= 1 + 1e-12).all()
    assert (step[w == 0] == 0).all()
    can = reachable(z, w, excess)
    size = (w.abs().sum(1) + excess.abs())[can]
    assert ((excess + (w * step).sum(1))[can].abs() <= 1e-12 * size).all()
    corner = torch.where(-excess[:, None] * w > 0, 1 - z, -z) * (w != 0)
    assert torch.allclose(step[~can], corner[~can], atol=1e-12)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("scale", [1e-26, 1.0, 1e12])
def test_float32_loses_only_rounding(norm, scale):
    z, w, excess = problems(200, 784, seed=0)
    exact = to_hyperplane(z, w, excess, norm)
    step = to_hyperplane(z.float(), (w * scale).float(), (excess * scale).float(), norm)
    assert step.dtype == torch.float32
    assert torch.allclose(length(step, norm).double(), length(exact, norm), rtol=1e-4)
    can = reachable(z, w, excess)
    left = (excess + (w * step.double()).sum(1))[can].abs()
    assert (left <= 1e-5 * w.abs().sum(1)[can]).all()


def test_tiny_entries_with_much_room_do_not_hide_the_largest():
    """Their part of <w, z> is below float32's rounding, their room is not: only the first entry must move."""
    w = torch.full((1, 300), 1e-10)
    w[0, :3] = torch.tensor([1.0, 0.5, 0.25])
    step = to_hyperplane(torch.full((1, 300), 0.5), w, torch.tensor([0.2]), "l1")
    assert step[0, 0].item() == pytest.approx(-0.2)
    assert (step[0, 1:] == 0).all()


@pytest.mark.parametrize("norm", NORMS)
def test_degenerate_rows_stand_still_and_disturb_nobody(norm):
    z, w, excess = problems(6, 9, seed=1)
    alone = to_hyperplane(z, w, excess, norm)
    w[0], excess[1], w[2, 3], excess[3] = 0, 0, torch.nan, torch.nan
    excess[0] = 1.0
    step = to_hyperplane(z, w, excess, norm)
    assert (step[:2] == 0).all()
    assert torch.equal(step[4:], alone[4:])


@pytest.mark.parametrize("norm", NORMS)
def test_box_of_other_bounds_is_the_unit_box_stretched(norm):
    z, w, excess = problems(50, 12, seed=2)
    step = to_hyperplane(z, w, excess, norm)
    wide = to_hyperplane(5 * z - 3, w, 5 * excess, norm, bounds=(-3.0, 2.0))
    assert torch.allclose(wide, 5 * step, atol=1e-9)


def test_rows_are_their_own():
    z, w, excess = problems(30, 50, seed=3)
    for norm in NORMS:
        whole = to_hyperplane(z, w, excess, norm)
        alone = torch.cat([to_hyperplane(z[k : k + 1], w[k : k + 1], excess[k : k + 1], norm) for k in range(30)])
        assert torch.allclose(whole, alone, rtol=1e-12, atol=1e-14)


def test_lengths():
    v = torch.randn(20, 30, dtype=torch.float64)
    for norm, order in (("linf", torch.inf), ("l2", 2), ("l1", 1)):
        assert torch.allclose(length(v, norm), torch.linalg.vector_norm(v, ord=order, dim=1))
    assert torch.equal(dual_length(v, "linf"), length(v, "l1"))
    assert torch.equal(dual_length(v, "l1"), length(v, "linf"))
    tiny = torch.full((1, 4), 1e-30)
    assert length(tiny, "l2").item() == pytest.approx(2e-30)
    assert length(torch.zeros(1, 4), "l2").item() == 0


def test_unknown_norm():
    with pytest.raises(UnmovedError, match="did you mean 'linf'"):
        to_hyperplane(torch.zeros(1, 2), torch.ones(1, 2), torch.ones(1), "lin")
