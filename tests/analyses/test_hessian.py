"""Trace and top eigenvalue against the Hessian itself; skipped without curvlinops."""

from __future__ import annotations

import importlib
import math
import warnings

import numpy as np
import pytest
import torch
from scipy.sparse.linalg import ArpackNoConvergence
from torch import nn
from torch.nn import functional as F

from unmoved import Batch
from unmoved.analyses.corruption import sweep
from unmoved.analyses.flatness import summarise
from unmoved.analyses.hessian import Curvature, curvature, second_order
from unmoved.analyses.risks import ModelRisk
from unmoved.core.errors import UnmovedError


@pytest.fixture
def _curvlinops():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pytest.importorskip("curvlinops")


def network(pool=nn.MaxPool2d):
    """In training, with statistics of its own; pooling and normalisation have forward derivatives too."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Tanh(), pool(2), nn.Dropout(0.5), nn.Flatten())
        net.append(nn.Linear(8, 3))
        net(torch.rand(8, 1, 6, 6))
    return net.double()


def images():
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(17, 1, 6, 6, generator=generator, dtype=torch.float64)
    return Batch(x, torch.randint(3, (17,), generator=generator))


def hessian(net, batch, scope):
    """The Hessian itself, of the mean over all images."""
    net = net.eval()
    chosen = {name: p.detach() for name, p in net.named_parameters() if scope in ("global", name)}
    shapes = [p.shape for p in chosen.values()]

    def loss(w):
        parts = w.split([math.prod(shape) for shape in shapes])
        named = {name: part.reshape(shape) for name, part, shape in zip(chosen, parts, shapes, strict=True)}
        return F.cross_entropy(torch.func.functional_call(net, named, batch.x), batch.y)

    return torch.autograd.functional.hessian(loss, torch.cat([p.flatten() for p in chosen.values()]))


@pytest.mark.usefixtures("_curvlinops")
@pytest.mark.parametrize("scope", ["global", "0.weight"])
def test_trace_and_top_eigenvalue_are_those_of_the_hessian(scope):
    net = network()
    before = [(name, value.numpy().tobytes()) for name, value in net.state_dict().items()]
    state = torch.get_rng_state()
    found = curvature(ModelRisk(net, [images()], scope=scope, batch_size=9), vectors=40, tolerance=1e-8)
    h = hessian(network(), images(), scope)
    assert found.k == len(h)
    assert found.images == 17
    assert found.top == pytest.approx(torch.linalg.eigvalsh(h)[-1].item(), rel=1e-6)
    assert abs(found.trace - h.trace().item()) < 3 * found.trace_error
    variance = 2 * ((h**2).sum() - (h.diagonal() ** 2).sum()) / 40
    assert found.trace_error == pytest.approx(variance.sqrt().item(), rel=0.5)
    assert [(name, value.numpy().tobytes()) for name, value in net.state_dict().items()] == before
    assert all(module.training for module in net.modules())
    assert all(p.grad is None for p in net.parameters())
    assert torch.equal(torch.get_rng_state(), state)


def test_what_small_corruptions_measure_is_the_curvature_of_a_smooth_model():
    risk = ModelRisk(network(nn.AvgPool2d), [images()])
    exact = hessian(network(nn.AvgPool2d), images(), "global").trace().item()
    summary = summarise(sweep(risk, [1e-3, 1e-2], draws=300, steps=0))
    rows = second_order(summary, Curvature("global", 51, exact, 0.0, 1.0, 17))
    for _, row in rows.iterrows():
        error = (row["controlled_high"] - row["controlled_low"]) / 4
        assert abs(row["controlled"] - row["predicted"]) < 3 * error
        assert error < 0.3 * abs(row["predicted"])


@pytest.mark.usefixtures("_curvlinops")
def test_lanczos_that_does_not_converge_is_an_error_and_restores(monkeypatch):
    net = network()

    def never(*_, **__):
        raise ArpackNoConvergence("no convergence", np.empty(0), np.empty(0))

    monkeypatch.setattr("unmoved.analyses.hessian.eigsh", never)
    with pytest.raises(UnmovedError, match=r"Lanczos did not reach tolerance 0\.001 in 200 restarts"):
        curvature(ModelRisk(net, [images()]), vectors=2)
    assert all(module.training for module in net.modules())


# --- without curvlinops


@pytest.mark.parametrize(("p", "n", "moved"), [(2, None, 1), (2, 5, 1), (math.inf, None, 51), (math.inf, 5, 5)])
def test_the_prediction_is_the_second_order_theory(p, n, moved):
    risk = ModelRisk(network(), [images()])
    k = sum(t.numel() for t in risk.parameters)
    assert k == 51
    summary = summarise(sweep(risk, [1e-3, 1e-2], p=p, n=n, draws=2, steps=2))
    rows = second_order(summary, Curvature("global", k, 30.0, 3.0, 7.0, 17))
    assert set(rows["kind"]) == {"random"}
    assert set(rows["measure"]) == {"loss"}
    np.testing.assert_allclose(rows["predicted"], rows["eps"] ** 2 * moved * 30 / (2 * k))
    np.testing.assert_allclose(rows["predicted_error"], rows["predicted"] / 10)
    if p == 2:
        np.testing.assert_allclose(rows["predicted_top"], rows["eps"] ** 2 * 3.5)
    else:
        assert rows["predicted_top"].isna().all()
    with pytest.raises(UnmovedError, match=r"scope 'x', came scopes \['global'\]"):
        second_order(summary, Curvature("x", k, 30.0, 3.0, 7.0, 17))
    with pytest.raises(UnmovedError, match=r"second_order: expected a table with .* came none of eps"):
        second_order(summary.drop(columns="eps"), Curvature("global", k, 30.0, 3.0, 7.0, 17))


def test_without_curvlinops_the_error_says_what_to_install(monkeypatch):
    real = importlib.import_module

    def missing(name, *rest):
        if name == "curvlinops":
            raise ImportError("No module named 'curvlinops'")
        return real(name, *rest)

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(UnmovedError, match=r"unmoved\[hessian\]"):
        curvature(ModelRisk(network(), [images()]))
