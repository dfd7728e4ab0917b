"""The threat model: starts have the distribution they claim, steps and projections are optimal, the check bites."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import optimize, stats
from torch import Tensor

from unmoved.core.batch import Batch
from unmoved.core.errors import UnmovedError
from unmoved.core.phases import Ramp
from unmoved.core.threat import NORMS, ThreatModel

ALL_NORMS = pytest.mark.parametrize("norm", NORMS)
LEAST_P = 1e-4  # of a distribution test at fixed keys
ORDER = {"linf": math.inf, "l2": 2, "l1": 1}
DUAL = {"linf": 1, "l2": 2, "l1": math.inf}
EXAMPLES = settings(max_examples=40, deadline=None, derandomize=True)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=generator(seed), dtype=torch.float64)


def grey(n: int, *shape: int) -> Batch:
    """Images in the middle of the box, where no clipping touches a small ball."""
    return Batch(torch.full((n, *shape), 0.5), torch.zeros(n, dtype=torch.int64))


def ball(norm: str, eps: float, n: int, shape: tuple[int, ...], seed: int) -> Tensor:
    """Points of the ball around 0, among them its corners and surface, by a recipe that is not the package's."""
    points = torch.randn(n, *shape, generator=generator(seed), dtype=torch.float64)
    if norm == "linf":
        return torch.cat([points.sign(), points.clamp(-1, 1)]) * eps
    unit = points / points.flatten(1).norm(p=ORDER[norm], dim=1).reshape(-1, *[1] * len(shape))
    if norm == "l1":  # its corners have one pixel each
        corners = torch.zeros_like(unit).flatten(1)
        corners[torch.arange(n), torch.arange(n) % corners.shape[1]] = points.flatten(1)[:, 0].sign()
        unit = torch.cat([unit[n // 2 :], corners[: n // 2].reshape(-1, *shape)])
    return torch.cat([unit, unit * rand(n, *[1] * len(shape), seed=seed + 1)]) * eps


def inner(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).flatten(1).sum(1)


# --- starts


def test_the_linf_start_is_uniform_in_the_box() -> None:  # T7
    batch = grey(200, 1, 10, 10)
    delta = (ThreatModel("linf", 0.1).start(batch, seed=1) - batch.x).flatten().double()
    assert delta.abs().max() <= 0.1 + 1e-6
    assert stats.kstest(delta.numpy(), stats.uniform(-0.1, 0.2).cdf).pvalue > LEAST_P


@pytest.mark.parametrize("shape", [(1, 1, 2), (3, 1, 1), (3, 4, 4)])
def test_the_l2_start_is_uniform_in_the_ball(shape: tuple[int, ...]) -> None:
    """T7: the radius is U^(1/d), so (r/eps)^d is uniform; each coordinate has the marginal of the ball."""
    batch, eps, d = grey(4000, *shape), 0.3, math.prod(shape)
    delta = (ThreatModel("l2", eps).start(batch, seed=2) - batch.x).flatten(1).double() / eps
    radius = delta.norm(dim=1)
    assert radius.max() <= 1 + 1e-5
    assert stats.kstest((radius**d).clamp(0, 1).numpy(), "uniform").pvalue > LEAST_P
    # A coordinate x of a uniform point of the d-ball: (x + 1) / 2 is Beta((d + 1) / 2, (d + 1) / 2).
    beta = stats.beta((d + 1) / 2, (d + 1) / 2).cdf
    for coordinate in (delta[:, 0], delta[:, -1]):
        assert stats.kstest(((coordinate + 1) / 2).numpy(), beta).pvalue > LEAST_P
    if d == 2:
        angle = torch.atan2(delta[:, 0], delta[:, 1]).numpy()
        assert stats.kstest(angle, stats.uniform(-math.pi, 2 * math.pi).cdf).pvalue > LEAST_P


@pytest.mark.parametrize("shape", [(1, 1, 2), (3, 1, 1), (3, 4, 4)])
def test_the_l1_start_is_uniform_in_the_ball(shape: tuple[int, ...]) -> None:
    """With the slack, the sizes of its d coordinates are uniform on a simplex: (1, ..., 1) Dirichlet, so Beta(1, d)."""
    batch, eps, d = grey(4000, *shape), 0.4, math.prod(shape)
    delta = (ThreatModel("l1", eps).start(batch, seed=3) - batch.x).flatten(1).double() / eps
    radius = delta.abs().sum(dim=1)
    assert radius.max() <= 1 + 1e-6
    assert stats.kstest((radius**d).clamp(0, 1).numpy(), "uniform").pvalue > LEAST_P
    for coordinate in (delta[:, 0], delta[:, -1]):
        assert stats.kstest(coordinate.abs().numpy(), stats.beta(1, d).cdf).pvalue > LEAST_P
        assert stats.binomtest(int((coordinate > 0).sum()), len(coordinate)).pvalue > LEAST_P


@ALL_NORMS
def test_a_start_is_in_the_ball_and_a_valid_image(norm: str) -> None:
    x = rand(50, 3, 8, 8).float().round(decimals=0)  # black and white: every pixel is on the edge of the box
    threat = ThreatModel(norm, 0.4)
    start = threat.start(Batch(x, torch.zeros(50, dtype=torch.int64)), seed=0)
    threat.check(start, x)
    assert start.dtype == x.dtype
    assert not torch.equal(start, x)


@ALL_NORMS
def test_a_start_depends_on_seed_stream_step_and_sample_and_nothing_else(norm: str) -> None:  # T6, T15
    threat, batch = ThreatModel(norm, 0.1), grey(6, 1, 4, 4)
    before = torch.get_rng_state()
    start = threat.start(batch, seed=5)
    assert torch.equal(torch.get_rng_state(), before)
    order = torch.tensor([4, 1, 5])
    assert torch.equal(threat.start(batch.take(order), seed=5), start[order])
    others = [
        threat.start(batch, seed=6),
        threat.start(batch, seed=5, stream=1),
        threat.start(dataclasses.replace(batch, step=1), seed=5),
        threat.start(dataclasses.replace(batch, index=batch.index + 6), seed=5),
        start.roll(1, 0),
    ]
    assert not any((other == start).flatten(1).all(1).any() for other in others)


# --- steps


@ALL_NORMS
@EXAMPLES
@given(seed=st.integers(0, 10**6))
def test_the_steepest_step_attains_the_dual_norm(norm: str, seed: int) -> None:
    """Hoelder: max <g, s> over unit s is the dual norm of g, and no other unit step does better."""
    g = torch.randn(4, 3, 3, 3, generator=generator(seed), dtype=torch.float64)
    threat = ThreatModel(norm, 1.0)
    step = threat.steepest(g)
    dual = torch.linalg.vector_norm(g.flatten(1), ord=DUAL[norm], dim=1)
    torch.testing.assert_close(inner(g, step), dual)
    torch.testing.assert_close(threat.distance(step, torch.zeros_like(step)), torch.ones(4, dtype=torch.float64))
    for z in ball(norm, 1.0, 20, (3, 3, 3), seed):
        assert (inner(g, z.expand_as(g)) <= dual + 1e-9).all()


@ALL_NORMS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_zero_gradient_gives_a_zero_step_and_spares_its_neighbours(norm: str, dtype: torch.dtype) -> None:  # T11
    g = torch.ones(3, 1, 2, 2, dtype=dtype)
    g[1] = 0
    step = ThreatModel(norm, 1.0).steepest(g)
    assert step.dtype == dtype
    assert torch.equal(step[1], torch.zeros(1, 2, 2, dtype=dtype))
    unit = {"linf": torch.ones(4), "l2": torch.full((4,), 0.5), "l1": torch.tensor([1.0, 0, 0, 0])}[norm]
    torch.testing.assert_close(step[[0, 2]], unit.to(dtype).reshape(1, 1, 2, 2).expand(2, -1, -1, -1))


def test_of_equal_gradients_the_l1_step_takes_the_first() -> None:
    g = torch.tensor([[0.5, -2.0, 2.0, -2.0], [0.0, 0.0, -1.0, 1.0]]).reshape(2, 2, 1, 2)
    step = ThreatModel("l1", 1.0).steepest(g).flatten(1)
    assert step.tolist() == [[0.0, -1.0, 0.0, 0.0], [0.0, 0.0, -1.0, 0.0]]


def check_scale(norm: str, scale: float) -> None:
    g = torch.randn(4, 1, 5, 5, generator=generator())
    threat = ThreatModel(norm, 1.0)
    torch.testing.assert_close(threat.steepest(g * scale), threat.steepest(g), rtol=1e-4, atol=1e-6)


@ALL_NORMS
@pytest.mark.parametrize("scale", [1e-15, 1e15])
def test_a_step_does_not_depend_on_the_size_of_the_gradient(norm: str, scale: float) -> None:  # T10
    check_scale(norm, scale)


@pytest.mark.parametrize("scale", [1e-37, 1e-25, 1e25, 1e37])
@ALL_NORMS
def test_a_step_survives_gradients_whose_squares_leave_float32(norm: str, scale: float) -> None:  # T10, T11
    """A confident model has such gradients (a margin of 60 makes 1e-26), and a zero step would call it robust."""
    check_scale(norm, scale)


# --- projection


@ALL_NORMS
@EXAMPLES
@given(seed=st.integers(0, 10**6), eps=st.floats(0.01, 0.3), reach=st.floats(0.01, 3))
def test_the_projection_is_the_nearest_point_of_the_ball(norm: str, seed: int, eps: float, reach: float) -> None:
    """p is nearest to v in a convex set iff <v - p, z - p> <= 0 for all its points z; here the ball is in the box."""
    x = 0.4 + 0.2 * rand(5, 2, 3, 3, seed=seed)
    v = x + reach * torch.randn(x.shape, generator=generator(seed), dtype=torch.float64)
    threat = ThreatModel(norm, eps)
    p = threat.project(v, x)
    assert (threat.distance(p, x) <= eps + 1e-12).all()
    for z in ball(norm, eps, 20, (2, 3, 3), seed):
        assert (inner(v - p, x + z - p) <= 1e-9).all()


@EXAMPLES
@given(seed=st.integers(0, 10**6), eps=st.floats(0.01, 0.9))
@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_the_projection_is_nearest_where_the_box_cuts_the_ball(norm: str, seed: int, eps: float) -> None:
    x = rand(5, 1, 3, 3, seed=seed)
    x[:2] = x[:2].round()  # on faces of the box
    v = x + torch.randn(x.shape, generator=generator(seed), dtype=torch.float64)
    p = ThreatModel(norm, eps).project(v, x)
    for z in ball(norm, eps, 20, (1, 3, 3), seed):
        assert (inner(v - p, (x + z).clamp(0, 1) - p) <= 1e-9).all()


def by_quadratic_program(v: np.ndarray, x: np.ndarray, eps: float) -> np.ndarray:
    """min ||x + a - b - v||^2 over a, b >= 0 with sum(a + b) <= eps and 0 <= x + a - b <= 1."""
    n = len(x)
    result = optimize.minimize(
        lambda ab: ((x + ab[:n] - ab[n:] - v) ** 2).sum(),
        np.zeros(2 * n),
        jac=lambda ab: 2 * np.concatenate([(x + ab[:n] - ab[n:] - v), -(x + ab[:n] - ab[n:] - v)]),
        bounds=[(0, 1 - pixel) for pixel in x] + [(0, pixel) for pixel in x],
        constraints={"type": "ineq", "fun": lambda ab: eps - ab.sum(), "jac": lambda ab: -np.ones(2 * n)},
        method="SLSQP",
        options={"ftol": 1e-14, "maxiter": 500},
    )
    return x + result.x[:n] - result.x[n:]


@pytest.mark.parametrize("eps", [0.05, 0.8, 2.5, 20.0])
def test_the_l1_projection_against_a_quadratic_program(eps: float) -> None:
    x = rand(6, 1, 2, 4, seed=4)
    x[:3] = x[:3].round()
    v = x + torch.randn(x.shape, generator=generator(5), dtype=torch.float64)
    v[0, 0, 0, :2] = x[0, 0, 0, :2]  # pixels that nobody moves
    ours = ThreatModel("l1", eps).project(v, x).flatten(1)
    for p, far, image in zip(ours, v.flatten(1), x.flatten(1), strict=True):
        np.testing.assert_allclose(p, by_quadratic_program(far.numpy(), image.numpy(), eps), atol=2e-6)


def by_bisection(v: np.ndarray, x: np.ndarray, eps: float) -> np.ndarray:
    """Each pixel loses t of its way to v, the same t for all, and stops at the box."""
    way, room = np.abs(v - x), np.where(v > x, 1 - x, x)

    def sizes(t: float) -> np.ndarray:
        return np.clip(way - t, 0, room)

    inside = sizes(0).sum() <= eps
    t = 0.0 if inside else optimize.bisect(lambda t: sizes(t).sum() - eps, 0, way.max(), xtol=1e-14)
    return x + np.sign(v - x) * sizes(t)


@pytest.mark.parametrize("scale", [0.01, 1.0, 30.0])
@pytest.mark.parametrize("grid", [0, 8])
def test_the_l1_projection_against_a_bisection(scale: float, grid: int) -> None:
    """Large images, sample by sample, in float64; on a coarse grid of values many pixels tie."""
    x = rand(12, 3, 9, 9, seed=6)
    v = x + scale * torch.randn(x.shape, generator=generator(7), dtype=torch.float64)
    x, v = (torch.where(torch.arange(12)[:, None, None, None] % 3 == 0, t.round(), t) for t in (x, v))
    x[:6] = x[:6].round()
    if grid:
        x, v = (x * grid).round() / grid, (v * grid).round() / grid
    radius = torch.logspace(-3, 2.5, 12, dtype=torch.float64)
    ours = ThreatModel("l1", 1.0).project(v, x, radius)
    for p, far, image, eps in zip(ours, v.numpy(), x.numpy(), radius.numpy(), strict=True):
        np.testing.assert_allclose(p, by_bisection(far, image, eps), atol=1e-10)


@pytest.mark.parametrize("eps", [0.1, 1.0, 3.0, 5.0])
def test_the_l2_projection_of_what_lies_outside_is_on_the_sphere(eps: float) -> None:
    """Whatever the box stops: pixels that leave it by very different lengths reach it one after the other."""
    x = rand(64, 1, 1, 784, seed=8).float()
    size = 0.1 * torch.exp(3 * torch.randn(x.shape, generator=generator(9)))
    v = x + size * torch.randn(x.shape, generator=generator(10))
    threat = ThreatModel("l2", eps)
    assert threat.distance(v.clamp(0, 1), x).min() > eps
    lengths = threat.distance(threat.project(v, x), x)
    torch.testing.assert_close(lengths, torch.full_like(lengths, eps), rtol=1e-5, atol=0)


def test_clipping_the_nearest_point_of_the_l1_ball_is_not_the_projection() -> None:
    """Mind the box: at a white pixel the clipped budget goes elsewhere."""
    x = torch.tensor([1.0, 0.5]).reshape(1, 1, 1, 2)
    v = x + torch.tensor([0.4, 0.4]).reshape(1, 1, 1, 2)
    p = ThreatModel("l1", 0.3).project(v, x)
    torch.testing.assert_close(p, torch.tensor([1.0, 0.8]).reshape(1, 1, 1, 2))


@pytest.mark.parametrize("eps", [0.001, 0.05, 30.0])
def test_rounding_of_many_pixels_does_not_carry_l1_out_of_the_ball(eps: float) -> None:
    """T9: in this norm rounding errors add up over pixels; projected points pay for them."""
    x = rand(4, 3, 64, 64, seed=8).float()
    threat, batch = ThreatModel("l1", eps), Batch(x, torch.zeros(4, dtype=torch.int64))
    start = threat.start(batch, seed=0)
    for p in (start, threat.project(x + torch.randn(x.shape, generator=generator()), x)):
        assert threat.distance(p, x).max() <= eps * (1 + 1e-6)


@ALL_NORMS
def test_the_projection_against_a_grid(norm: str) -> None:
    """Brute force over a fine grid of the two-pixel ball."""
    eps, axis = 0.25, torch.linspace(-0.25, 0.25, 401, dtype=torch.float64)
    grid = torch.cartesian_prod(axis, axis)
    grid = grid[torch.linalg.vector_norm(grid, ord=ORDER[norm], dim=1) <= eps]
    x = torch.full((1, 1, 1, 2), 0.5, dtype=torch.float64)
    for v in rand(40, 1, 1, 1, 2, seed=3) * 2 - 0.5:
        nearest = (grid - (v - x).flatten()).norm(dim=1).min()
        p = ThreatModel(norm, eps).project(v, x)
        # Both within a cell of the grid of the best, and no point of the grid is nearer.
        assert nearest - 2e-3 <= (v - p).norm() <= nearest + 1e-12


@ALL_NORMS
@EXAMPLES
@given(seed=st.integers(0, 10**6), eps=st.floats(0, 1), reach=st.floats(0, 10))
def test_the_projection_is_valid_idempotent_and_leaves_the_inside_alone(
    norm: str, seed: int, eps: float, reach: float
) -> None:
    """In float32, as attacks run: what is projected always passes the check (T9)."""
    x = rand(4, 3, 16, 16, seed=seed).float()
    x[0] = x[0].round()
    threat = ThreatModel(norm, eps)
    p = threat.project(x + reach * torch.randn(x.shape, generator=generator(seed)), x)
    threat.check(p, x)
    torch.testing.assert_close(threat.project(p, x), p, rtol=0, atol=1e-6)
    torch.testing.assert_close(threat.project(x, x), x, rtol=0, atol=0)


@ALL_NORMS
def test_the_projection_of_a_sample_does_not_know_its_batch(norm: str) -> None:  # T15
    x = rand(6, 1, 4, 4).float()
    v, threat = x + torch.randn(x.shape, generator=generator()), ThreatModel(norm, 0.2)
    assert torch.equal(threat.project(v, x), torch.cat([threat.project(v[k : k + 1], x[k : k + 1]) for k in range(6)]))


@ALL_NORMS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_eps_zero_is_the_image_itself(norm: str, dtype: torch.dtype) -> None:  # T16
    x = rand(20, 3, 8, 8).to(dtype)
    batch, threat = Batch(x, torch.zeros(20, dtype=torch.int64)), ThreatModel(norm, 0)
    assert torch.equal(threat.start(batch, seed=0), x)
    assert torch.equal(threat.project(x + torch.randn(x.shape, generator=generator()).to(dtype), x), x)


def test_other_bounds_are_kept() -> None:
    x = rand(10, 1, 4, 4) * 2 - 1
    p = ThreatModel("linf", 1.5, bounds=(-1.0, 1.0)).project(x + 3, x)
    assert torch.equal(p, (x + 1.5).clamp(max=1))


# --- distance and check


@ALL_NORMS
def test_the_distance_is_numpys_in_float64(norm: str) -> None:
    a, b = rand(7, 3, 4, 4).float(), rand(7, 3, 4, 4, seed=1).float()
    distance = ThreatModel(norm, 1.0).distance(a, b)
    difference = (a.double() - b.double()).flatten(1).numpy()
    assert distance.dtype == torch.float64
    np.testing.assert_allclose(distance, np.linalg.norm(difference, ord=ORDER[norm], axis=1))


def one_pixel(value: float) -> Tensor:
    x = torch.full((2, 1, 2, 2), 0.5)
    x[1, 0, 1, 1] = value
    return x


@ALL_NORMS
@pytest.mark.parametrize(
    ("x_adv", "message"),
    [
        (one_pixel(math.nan), r"'pgd' left the valid images: pixel nan outside \[0, 1\]"),
        (one_pixel(math.inf), r"'pgd' left the valid images: pixel inf outside \[0, 1\]"),
        (one_pixel(1.25), r"'pgd' left the valid images: pixel 1.25 outside \[0, 1\]"),
        (one_pixel(-0.5), r"'pgd' left the valid images: pixel -0.5 outside \[0, 1\]"),
        (one_pixel(0.625), r"'pgd' left the threat model: distance 0.125 > eps 0.1"),
        (torch.full((2, 1, 2, 3), 0.5), r"'pgd' changed the shape: \(2, 1, 2, 2\) became \(2, 1, 2, 3\)"),
        (torch.full((1, 1, 2, 2), 0.5), r"'pgd' changed the shape"),
    ],
)
def test_the_check_names_what_left_and_by_how_much(norm: str, x_adv: Tensor, message: str) -> None:
    with pytest.raises(UnmovedError, match=message):
        ThreatModel(norm, 0.1).check(x_adv, one_pixel(0.5), "pgd")


@ALL_NORMS
def test_the_check_takes_the_edge_the_clean_image_and_an_empty_batch(norm: str) -> None:
    threat, x = ThreatModel(norm, 0.1), one_pixel(0.5)
    for x_adv in (x, one_pixel(0.6), one_pixel(0.4)):
        threat.check(x_adv, x)
    threat.check(x[:0], x[:0])
    with pytest.raises(UnmovedError, match="left the threat model"):
        threat.check(one_pixel(0.5 + 0.1 + 2 * threat.tolerance), x)


# --- the value


@pytest.mark.parametrize(
    ("norm", "eps", "message"),
    [
        ("linf", 8, r'expected at most 1 for linf on images in \[0.0, 1.0\], came 8; .* write "8/255"'),
        ("linf", Ramp(0, 8), r'came 8; if it is in 0..255 units write "8/255"'),
        ("linf", -0.1, r"threat.eps: expected a finite number >= 0, came -0.1"),
        ("l2", Ramp(0.5, -1), r"threat.eps: expected a finite number >= 0, came -1"),
        ("l2", math.nan, r"threat.eps: expected a finite number >= 0, came nan"),
        ("l2", math.inf, r"came inf"),
        ("linf", "8/255", r"came '8/255'"),
        ("linf", True, r"came True"),
        ("l_inf", 0.1, r"threat.norm: unknown value 'l_inf'; did you mean 'linf'\?"),
        ("l3", 0.1, r"threat.norm: unknown value 'l3'"),
    ],
)
def test_what_is_no_threat_model_says_why(norm: str, eps: Any, message: str) -> None:
    with pytest.raises(UnmovedError, match=message):
        ThreatModel(norm, eps)


@pytest.mark.parametrize("norm", ["l2", "l1"])
def test_eps_may_be_larger_than_one(norm: str) -> None:
    assert ThreatModel(norm, 8).radius == 8


def test_a_ramp_is_a_value_but_not_a_radius() -> None:
    threat = ThreatModel("linf", Ramp(0, 0.3))
    x = one_pixel(0.5)
    for use in (lambda: threat.radius, lambda: threat.project(x, x), lambda: threat.check(x, x)):
        with pytest.raises(UnmovedError, match=r"threat.eps is a Ramp: .* give a number here"):
            use()


def test_it_is_a_frozen_value_whose_repr_rebuilds_it() -> None:
    threat = ThreatModel("l2", 0.5)
    assert eval(repr(threat)) == threat
    assert hash(threat) == hash(ThreatModel("l2", 0.5))
    with pytest.raises(dataclasses.FrozenInstanceError):
        threat.eps = 1.0
