"""Defenses that are broken on purpose, and honest models, on scikit-learn's digits: what the doctor is tried on."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unmoved import data, models
from unmoved.attacks import PGD, Sensible
from unmoved.core.phases import Ramp
from unmoved.core.protocols import Method
from unmoved.core.threat import ThreatModel
from unmoved.terms import CE, KL, TRADES, LogitSqueeze, Sum
from unmoved.training.loop import train
from unmoved.training.optim import Adam, OneCycle

THREAT = ThreatModel("linf", 0.15)
SHAPE = (1, 8, 8)


@cache
def digits() -> data.DataSet:
    return data.digits()


def drawn(make: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    """A model whose weights are drawn by a seed of its own."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make()


def perceptron() -> nn.Module:
    return drawn(lambda: models.mlp(SHAPE, 10, hidden=(128,)))


def network() -> nn.Module:
    return drawn(lambda: models.small_cnn(SHAPE, 10, padding=1, dropout=0.0, width=8))


def trained(model: nn.Module, method: Method, epochs: int, lr: float = 4e-3) -> nn.Module:
    """By the one loop, as the recipes of digits do, with fewer epochs."""
    optimizer, schedule = Adam(lr=lr), OneCycle()
    train(
        model,
        method,
        digits().train,
        epochs=epochs,
        batch_size=64,
        optimizer=optimizer,
        schedule=schedule,
        device="cpu",
    )
    return model.eval()


RAMP = ThreatModel("linf", Ramp(0.0, 0.15, 0.4))


@cache
def standard() -> nn.Module:
    return trained(perceptron(), Method(None, CE("clean")), epochs=8)


@cache
def at() -> nn.Module:
    return trained(perceptron(), Method(PGD(RAMP, steps=5), CE("adv")), epochs=12)


@cache
def trades() -> nn.Module:
    return trained(perceptron(), Method(PGD(RAMP, loss=KL(), start="gaussian", steps=5), TRADES()), epochs=12)


HONEST: dict[str, Callable[[], nn.Module]] = {"standard": standard, "at": at, "trades": trades}


# --- layers that break a model


class Layer(nn.Module):
    """A function as a layer."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def before(model: nn.Module, function: Callable[[Tensor], Tensor]) -> nn.Sequential:
    return nn.Sequential(Layer(function), copy.deepcopy(model)).eval()


def after(model: nn.Module, function: Callable[[Tensor], Tensor]) -> nn.Sequential:
    return nn.Sequential(copy.deepcopy(model), Layer(function)).eval()


def scaled(z: Tensor) -> Tensor:
    return 1000 * z


def rounded(x: Tensor) -> Tensor:
    return (8 * x).round() / 8


def straight_through(x: Tensor) -> Tensor:
    return x + (rounded(x) - x).detach()


class Backwards(torch.autograd.Function):
    """The identity, whose gradient points the wrong way."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return -gradients[0]


def noisy(x: Tensor) -> Tensor:
    return x + 0.1 * torch.randn_like(x)


def dropped(x: Tensor) -> Tensor:
    return F.dropout(x, 0.2, training=True)


def softmax(z: Tensor) -> Tensor:
    return z.softmax(dim=1)


def log_softmax(z: Tensor) -> Tensor:
    return z.log_softmax(dim=1)


def thermometer(x: Tensor) -> Tensor:
    """How many of eight marks the pixel is above: comparisons have no gradient."""
    marks = torch.arange(8) / 8 + 1 / 16
    return (x[..., None] > marks).float().mean(dim=-1)


def whitened_by_the_batch(x: Tensor) -> Tensor:
    return (x - x.mean(dim=0)) / (x.std(dim=0, correction=0) + 0.1) * 0.3 + 0.3


def jagged(x: Tensor) -> Tensor:
    """Hardly another image, but its slope changes sign every few thousandths."""
    return x + 0.03 * torch.sin(1000 * x)


def compressed(x: Tensor) -> Tensor:
    """The cosine transform of the whole image with coarsely rounded coefficients, as JPEG has it."""
    k = torch.arange(8.0)
    basis = torch.cos(math.pi * (2 * k[None, :] + 1) * k[:, None] / 16) * 0.5
    basis[0] *= math.sqrt(0.5)
    return basis.T @ ((basis @ x @ basis.T) * 4).round().div(4) @ basis


def root_squared(x: Tensor) -> Tensor:
    """The identity on valid images; at 0 the slope of the root is infinite and that of the square zero."""
    return x.sqrt() ** 2


def times_255(x: Tensor) -> Tensor:
    return 255 * x


def sharpened(z: Tensor) -> Tensor:
    return 200 * z


# --- the broken defenses


@dataclass(frozen=True)
class Broken:
    """A broken defense.

    Attributes:
        make: the model, in the mode in which it is handed over.
        cause: the checks that name what is wrong with it; all of them must say "do not believe".
        shown: the images on which it shows, where that is not all of them.
    """

    make: Callable[[], nn.Module]
    cause: tuple[str, ...]
    shown: Callable[[nn.Module], data.ArraySplit] = lambda model: digits().test


@cache
def squeezed() -> nn.Module:
    """Logit squeezing of high weight, no attack in training: most units die, and their gradients with them."""
    return trained(network(), Method(None, Sum((1.0, CE("clean")), (1.0, LogitSqueeze()))), epochs=3)


def half_dead(model: nn.Module) -> data.ArraySplit:
    """Twenty images that the model gets right: ten whose gradient is zero throughout the ball, and ten others.

    How many of all images are such depends on where the training ends, and so on the processor's rounding.
    """
    test = digits().test
    (batch,) = test.batches(len(test))
    g = torch.Generator().manual_seed(0)
    largest = torch.zeros(len(test))
    for _ in range(8):
        x = (batch.x + 0.15 * (2 * torch.rand(batch.x.shape, generator=g) - 1)).clamp(0, 1).requires_grad_()
        (gradient,) = torch.autograd.grad(F.cross_entropy(model(x), batch.y, reduction="sum"), x)
        largest = torch.maximum(largest, gradient.flatten(1).abs().amax(dim=1))
    right = model(batch.x).argmax(dim=1) == batch.y
    dead, alive = (right & (largest == 0)).nonzero()[:10], (right & (largest > 0)).nonzero()[:10]
    assert len(dead) == len(alive) == 10
    return test.select(torch.cat([dead, alive]).flatten())


@cache
def sensible() -> nn.Module:
    """Trained with the sensible rule, then sharpened: the plateau of confidence that the rule leaves becomes flat."""
    model = trained(perceptron(), Method(PGD(RAMP, steps=5, stop=Sensible(0.5)), CE("adv")), epochs=8)
    return after(model, sharpened)


def in_training(model: nn.Module, *layers: nn.Module) -> nn.Module:
    return nn.Sequential(*layers, copy.deepcopy(model)).train()


@cache
def for_255() -> nn.Module:
    """Trained on pixels from 0 to 255, given pixels from 0 to 1."""
    inside = nn.Sequential(Layer(times_255), models.normalized(perceptron(), [80.0], [95.0]))
    return trained(inside, Method(None, CE("clean")), epochs=4)[1].eval()


def undone(x: Tensor) -> Tensor:
    """What the first of two normalisations by mean -1 and deviation 2 makes 0 and 1 again of."""
    return 2 * x - 1


@cache
def twice_normalised() -> nn.Module:
    """To [0.5, 1] and once more: networks on digits forgive another contrast, but not another background."""
    inside = models.normalized(perceptron(), [-1.0], [2.0])
    return models.normalized(trained(inside, Method(None, CE("clean")), epochs=4), [-1.0], [2.0]).eval()


def lost(healed: Callable[[], nn.Module], how_many: int = 20) -> Callable[[nn.Module], data.ArraySplit]:
    """Images that the healed model gets right: as many that the broken one gets wrong as others.

    How much accuracy a wrong scale costs depends on where the training ends, and so on the processor's rounding.
    """

    def shown(model: nn.Module) -> data.ArraySplit:
        test = digits().test
        (batch,) = test.batches(len(test))
        with torch.no_grad():
            could, does = (m(batch.x).argmax(dim=1) == batch.y for m in (healed(), model))
        gone, kept = (could & ~does).nonzero()[:how_many], (could & does).nonzero()[:how_many]
        assert len(gone) == how_many
        return test.select(torch.cat([gone, kept]).flatten())

    return shown


def for_minus_one_to_one(x: Tensor) -> Tensor:
    return (x + 1) / 2


BROKEN: dict[str, Broken] = {
    "saturated logits": Broken(lambda: after(at(), scaled), ("saturated logits",)),
    "sensible, overrated by PGD": Broken(sensible, ("PGD overrates", "saturated logits")),
    "logit squeezing of high weight": Broken(squeezed, ("zero gradients",), half_dead),
    "quantised input": Broken(lambda: before(standard(), rounded), ("zero gradients",)),
    "JPEG-like compression": Broken(lambda: before(standard(), compressed), ("zero gradients",)),
    "thermometer input": Broken(lambda: before(standard(), thermometer), ("no gradient",)),
    "straight-through rounding": Broken(lambda: before(standard(), straight_through), ("wrong gradients",)),
    "reversed gradient": Broken(lambda: before(standard(), Backwards.apply), ("wrong gradients", "fails at eps = 1")),
    "jagged input": Broken(lambda: before(standard(), jagged), ("black-box stronger",)),
    "noise in forward": Broken(lambda: before(standard(), noisy), ("randomness",)),
    "dropout that is always on": Broken(lambda: before(standard(), dropped), ("randomness",)),
    "dropout left on": Broken(lambda: in_training(standard(), nn.Dropout(0.2)), ("training mode",)),
    "BatchNorm left on": Broken(lambda: in_training(standard(), nn.BatchNorm2d(1)), ("training mode",)),
    "softmax twice": Broken(lambda: after(at(), softmax), ("probabilities",)),
    "batch statistics": Broken(lambda: before(standard(), whitened_by_the_batch), ("companions in the batch",)),
    "root at zero": Broken(lambda: before(standard(), root_squared), ("not finite",)),
    "pixels of another scale": Broken(for_255, ("normalisation",), lost(lambda: before(for_255(), times_255))),
    "made for [-1, 1]": Broken(lambda: before(standard(), for_minus_one_to_one), ("normalisation",), lost(standard)),
    "normalised twice": Broken(twice_normalised, ("normalisation",), lost(lambda: before(twice_normalised(), undone))),
}
