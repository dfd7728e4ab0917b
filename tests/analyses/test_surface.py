"""The surface of a quadratic is known; of a model, its middle is the model itself."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from helpers.function_risk import FunctionRisk
from torch import nn
from torch.nn import functional as F

from unmoved import Batch
from unmoved.analyses.risks import ModelRisk
from unmoved.analyses.surface import axes, plane, worst_and_random
from unmoved.core.errors import UnmovedError


def quadratic(slope=0.0):
    """L(w + a) = 2 + slope a_0 + 5 a_0^2 + a_1^2 / 2 + a_2^2 / 2, over two tensors."""
    first = torch.tensor([0.3, -1.0], dtype=torch.float64, requires_grad=True)
    second = torch.tensor([[2.0]], dtype=torch.float64, requires_grad=True)
    start = torch.tensor([0.3, -1.0, 2.0], dtype=torch.float64)

    def value():
        a = torch.cat([first, second.flatten()]) - start
        return 2 + slope * a[0] + 5 * a[0] ** 2 + (a[1] ** 2 + a[2] ** 2) / 2

    return FunctionRisk(value, [first, second])


def flat(parts):
    return torch.cat([part.flatten() for part in parts])


def test_directions_are_orthogonal_of_length_one_and_the_first_is_the_worst():
    risk = quadratic()
    u, v = (flat(parts) for parts in worst_and_random(risk, 0.5, steps=100))
    assert abs(u @ v) < 1e-14
    assert u.norm() == pytest.approx(1)
    assert v.norm() == pytest.approx(1)
    assert u[0].abs() > 0.999
    other = flat(worst_and_random(risk, 0.5, steps=100, draw=1)[1])
    assert (v - other).abs().max() > 0.1


def test_the_lines_are_the_parabolas_of_the_quadratic():
    table = axes(plane(quadratic(slope=1.0), 0.5, points=9, reach=2.0))
    worst, random = (table[table["direction"] == name] for name in ("worst", "random"))
    assert worst["a"].tolist() == pytest.approx(np.linspace(-2, 2, 9).tolist())
    np.testing.assert_allclose(worst["loss"], 2 + 0.5 * worst["a"] + 5 * (0.5 * worst["a"]) ** 2, atol=1e-6)
    _, v = (flat(parts) for parts in worst_and_random(quadratic(slope=1.0), 0.5))
    step = 0.5 * random["a"].to_numpy()[:, None] * v.numpy()
    np.testing.assert_allclose(random["loss"], 2 + step[:, 0] + 5 * step[:, 0] ** 2 + (step[:, 1:] ** 2).sum(1) / 2)


def test_the_plane_is_the_quadratic():
    risk = quadratic(slope=1.0)
    table = plane(risk, 0.5, points=5)
    u, v = (flat(parts).numpy() for parts in worst_and_random(risk, 0.5))
    a = 0.5 * (table[["a"]].to_numpy() * u + table[["b"]].to_numpy() * v)
    np.testing.assert_allclose(table["loss"], 2 + a[:, 0] + 5 * a[:, 0] ** 2 + (a[:, 1:] ** 2).sum(1) / 2)
    assert len(table) == 25


def test_where_every_step_lowers_the_risk_the_gradient_is_the_direction():
    w = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    risk = FunctionRisk(lambda: w[0] - 1e3 * (w**2).sum(), [w])
    u, _ = worst_and_random(risk, 1.0, steps=3)
    assert u[0].tolist() == pytest.approx([1, 0])


def network():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(48, 4))


def images():
    generator = torch.Generator().manual_seed(0)
    return Batch(torch.rand(20, 1, 6, 6, generator=generator), torch.randint(4, (20,), generator=generator))


@pytest.mark.parametrize("scope", ["global", "4.weight"])
def test_a_model_is_the_middle_of_its_surface_and_is_as_it_was(scope):
    net, batch = network(), images()
    before = [(name, value.numpy().tobytes()) for name, value in net.state_dict().items()]
    state, risk = torch.get_rng_state(), ModelRisk(net, [batch], scope=scope)
    square = plane(risk, 0.5, points=3)
    lines = axes(square)
    expected = F.cross_entropy(network().eval()(batch.x), batch.y).item()
    assert lines.loc[lines["a"] == 0, "loss"].tolist() == pytest.approx([expected] * 2)
    assert square.loc[(square["a"] == 0) & (square["b"] == 0), "loss"].tolist() == pytest.approx([expected])
    assert lines["loss"].idxmax() == lines.query("direction == 'worst' and a == 1").index[0]
    assert square["accuracy"].between(0, 1).all()
    assert set(square["scope"]) == {scope}
    assert set(lines["images"]) == {20}
    assert [(name, value.numpy().tobytes()) for name, value in net.state_dict().items()] == before
    assert all(module.training for module in net.modules())
    assert all(p.grad is None for p in net.parameters())
    assert torch.equal(torch.get_rng_state(), state)


def test_the_model_is_as_it_was_after_a_failure():
    net, calls = network(), itertools.count()
    before = [p.tolist() for p in net.parameters()]

    def fail(*_):
        if next(calls) == 15:
            raise InterruptedError

    net.register_forward_hook(fail)
    with pytest.raises(InterruptedError):
        plane(ModelRisk(net, [images()]), 0.5, points=3)
    assert [p.tolist() for p in net.parameters()] == before


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"points": 4}, "an odd number"),
        ({"points": 1}, "points: expected a whole number >= 3"),
        ({"reach": 0.0}, "reach"),
        ({"eps": 0.0}, "eps"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(UnmovedError, match=message):
        plane(quadratic(), **{"eps": 0.5} | settings)


def test_surfaces_that_do_not_exist():
    one = torch.ones(1, requires_grad=True)
    with pytest.raises(UnmovedError, match="at least two parameters"):
        plane(FunctionRisk(lambda: one.sum(), [one]), 0.5)
    top = torch.zeros(3, requires_grad=True)
    with pytest.raises(UnmovedError, match="in which the risk rises"):
        plane(FunctionRisk(lambda: -(top**2).sum(), [top]), 0.5)
