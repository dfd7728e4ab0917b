"""Gradients through dead ReLUs, against derivatives by hand and a network that hides behind one."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unmoved.attacks import APGD, FMN, PGD
from unmoved.attacks.odi import DiversifiedPGD
from unmoved.attacks.relu_backward import smoothed
from unmoved.core.batch import Batch
from unmoved.core.errors import UnmovedError
from unmoved.core.threat import ThreatModel

LINF = ThreatModel("linf", 0.3)
Z = torch.linspace(-2, 2, 41, dtype=torch.float64)
RELUS = [nn.ReLU(), nn.ReLU(inplace=True), F.relu, torch.relu, Tensor.relu, lambda z: z.relu()]


class Hidden(nn.Module):
    """The second class wins once three pixels are near 0.7, and below 0.68 nothing tells of it."""

    def forward(self, x: Tensor) -> Tensor:
        rise = F.relu(x.flatten(1) - 0.68).sum(1)
        return torch.stack([torch.full_like(rise, 0.05), rise], 1)


@pytest.mark.parametrize("relu", RELUS)
@pytest.mark.parametrize("alpha", [1.0, 10.0])
def test_values_are_those_of_relu_and_slopes_those_of_softplus(relu, alpha):
    z = Z.clone().requires_grad_()
    with smoothed(alpha):
        out = relu(z * 1)
    assert torch.equal(out, Z.clamp_min(0))
    (slope,) = torch.autograd.grad(out.sum(), z)
    soft = Z.clone().requires_grad_()
    (want,) = torch.autograd.grad((torch.log1p(torch.exp(alpha * soft)) / alpha).sum(), soft)
    assert torch.allclose(slope, want, rtol=1e-12, atol=0)


def test_outside_of_it_and_at_zero_nothing_is_changed():
    for context in (smoothed(0.0), torch.no_grad()):
        with context:
            F.relu(Z)
    z = Z.clone().requires_grad_()
    with smoothed(0.0):
        (slope,) = torch.autograd.grad(F.relu(z).sum(), z)
    assert torch.equal(slope, (Z > 0).double())
    with smoothed(10.0):
        out = nn.Softplus()(z) + nn.Tanh()(z)  # other functions keep their own
    (slope,) = torch.autograd.grad(out.sum(), z)
    (want,) = torch.autograd.grad((nn.Softplus()(z) + nn.Tanh()(z)).sum(), z)
    assert torch.equal(slope, want)
    (slope,) = torch.autograd.grad(F.relu(z).sum(), z)
    assert torch.equal(slope, (Z > 0).double())


@pytest.mark.parametrize("attack", [PGD, APGD, DiversifiedPGD])
def test_a_door_behind_dead_units_is_found(attack):
    x = torch.full((8, 1, 3, 3), 0.4)
    batch, model = Batch(x, torch.zeros(8, dtype=torch.int64)), Hidden()
    blind = attack(LINF, steps=8)(model, batch)
    found = attack(LINF, steps=8, smooth=10.0)(model, batch)
    assert (model(found).argmax(1) == 1).all()
    LINF.check(found, x)
    assert (model(blind).argmax(1) == 0).float().mean() > 0.5


def test_the_nearest_point_behind_dead_units_is_found():
    """Nine pixels at 0.68 + 0.05 / 9."""
    x = torch.full((1, 1, 3, 3), 0.4)
    batch = Batch(x, torch.zeros(1, dtype=torch.int64))
    assert torch.equal(FMN(LINF, steps=30)(Hidden(), batch), x)
    distance = LINF.distance(FMN(LINF, steps=30, smooth=10.0)(Hidden(), batch), x)
    assert distance.item() == pytest.approx(0.28 + 0.05 / 9, rel=0.01)


@pytest.mark.parametrize("attack", [PGD, APGD, FMN, DiversifiedPGD])
def test_a_negative_alpha_is_refused(attack):
    with pytest.raises(UnmovedError, match="smooth"):
        attack(LINF, smooth=-1.0)


# torch's own, when it traces a function with a derivative of its own
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_a_compiled_model_is_smoothed_too():
    torch.compiler.reset()
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).double()
    compiled = torch.compile(model, backend="aot_eager")
    x = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    gradients = []
    for net in (model, compiled, model):
        with smoothed(10.0):
            gradients += torch.autograd.grad(net(x).square().sum(), x)
    gradients += torch.autograd.grad(compiled(x).square().sum(), x)
    assert torch.allclose(gradients[0], gradients[1])
    assert torch.equal(gradients[0], gradients[2])
    assert not torch.allclose(gradients[0], gradients[3]), "and outside of the context it is not"
