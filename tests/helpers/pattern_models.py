"""Models of fixed weights on orthogonal patterns, of which everything is known: what they predict, and their margins.

An image is ``0.5 + contrast * pattern + noise`` with a pattern of -1 and 1, one of the rows of a Hadamard matrix for
each class. The model ``classifier`` has the logit ``<pattern_k, x - 0.5> / 8`` for class k: two patterns differ in half
of the pixels, so that linf perturbations below the contrast change no prediction, up to noise.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import scipy.linalg
import torch
from torch import Tensor, nn

from unmoved import models
from unmoved.data import ArraySplit

SIDE = 8
ROWS = (10, 19, 28, 37, 46, 52, 11, 20, 29, 38, 47, 53)  # none is the transposed pattern of another


def patterns(classes: int, channels: int = 1, first: int = 0) -> Tensor:
    """(K, C, 8, 8) of -1 and 1; the middle channel of three says nothing."""
    rows = torch.from_numpy(scipy.linalg.hadamard(SIDE * SIDE)).float()
    own = rows[list(ROWS[first : first + classes])].reshape(classes, 1, SIDE, SIDE)
    if channels == 1:
        return own
    other = rows[list(ROWS[-classes:])].reshape(classes, 1, SIDE, SIDE)
    return torch.cat([own, torch.zeros_like(own), other], dim=1)


def classifier(classes: int, channels: int = 1, *, bias: Sequence[float] = (), first: int = 0) -> nn.Module:
    model = models.linear((channels, SIDE, SIDE), classes)
    weight = patterns(classes, channels, first).flatten(1) / 8
    with torch.no_grad():
        model.linear.weight.copy_(weight)
        model.linear.bias.copy_(torch.tensor(bias or [0.0] * classes) - weight.sum(dim=1) / 2)
    return model.eval()


def images(label: Tensor, channels: int = 1, *, contrast: float | Tensor = 0.25, seed: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    signs = patterns(int(label.max()) + 1, channels)[label]
    noise = 0.03 * (2 * torch.rand(signs.shape, generator=g) - 1)
    return 0.5 + torch.as_tensor(contrast).reshape(-1, 1, 1, 1) * signs + noise


def split(n: int, classes: int, channels: int = 1, *, contrast: float | Tensor = 0.25) -> ArraySplit:
    """As many samples of each class as of the others."""
    label = torch.arange(n) % classes
    return ArraySplit.of(images(label, channels, contrast=contrast), label, classes=named(classes), layout="NCHW")


def named(classes: int) -> tuple[str, ...]:
    return tuple("abcdefghij"[:classes])


def labelled(given: ArraySplit, label: Tensor) -> ArraySplit:
    return ArraySplit.of(given.images, label, classes=given.classes, layout="NCHW")


def mixed(n: int, classes: int) -> ArraySplit:
    """One image in eight shows the pattern of the class after its own: the classifier is right on 7 of 8."""
    label = torch.arange(n) % classes
    shown = torch.where(torch.arange(n) % 8 == 7, (label + 1) % classes, label)
    return ArraySplit.of(images(shown), label, classes=named(classes), layout="NCHW")


# --- what is told apart by brightness, so that the scale of the pixels matters


class Levels(nn.Module):
    """The class is the nearest of the levels that the mean pixel may have."""

    def __init__(self, levels: Sequence[float]) -> None:
        super().__init__()
        self.register_buffer("levels", torch.tensor(levels))

    def forward(self, x: Tensor) -> Tensor:
        return 2 * x.flatten(1).mean(dim=1)[:, None] * self.levels - self.levels**2


def grey(levels: Sequence[float], counts: Sequence[int]) -> ArraySplit:
    label = torch.cat([torch.full((count,), k) for k, count in enumerate(counts)])
    g = torch.Generator().manual_seed(0)
    x = torch.tensor(levels)[label].reshape(-1, 1, 1, 1) + 0.02 * torch.rand(len(label), 1, 4, 4, generator=g)
    return ArraySplit.of(x, label, classes=named(len(levels)), layout="NCHW")


# --- broken models


@dataclass(frozen=True)
class Broken:
    """A broken model, what it is shown, and the check that names its fault, with its grade."""

    make: Callable[[], tuple[nn.Module, ArraySplit]]
    check: str
    grade: str = "do not believe"
    words: str = ""


def _chance() -> tuple[nn.Module, ArraySplit]:
    """Of each ten samples one is right, whatever the model says."""
    model, given = classifier(10), split(60, 10)
    return model, labelled(given, (model(given.images).argmax(dim=1) + torch.arange(60) // 10 + torch.arange(60)) % 10)


def _forgotten() -> tuple[nn.Module, ArraySplit]:
    """Made for levels of -1 and 1: raw pixels are all nearer to the second."""
    return Levels([-1.0, 1.0]).eval(), grey((0.1, 0.9), (8, 8))


def _twice() -> tuple[nn.Module, ArraySplit]:
    """The second normalisation takes the middle level to the lowest."""
    inner = models.normalized(Levels([-1.25, 0.0, 1.25]), [0.5], [0.32])
    return models.normalized(inner, [0.5], [0.32]).eval(), grey((0.1, 0.5, 0.9), (8, 9, 7))


PERMUTED = (0, 3, 1, 2, 6, 4, 5, 8, 9, 7)

BROKEN: dict[str, Broken] = {
    "constant": Broken(
        lambda: (nn.Sequential(classifier(3), Collapsed()).eval(), split(24, 3)),
        "constant prediction",
        words=r"class 1 \(b\), though 16",
    ),
    "chance": Broken(_chance, "no better than chance", words="6 of 60 samples"),
    "one class lost clean": Broken(
        lambda: (nn.Sequential(classifier(4), Forgetful()).eval(), split(40, 4)),
        "class lost",
        words=r"0 of 10 .* class 2 \(c\)",
    ),
    "one class lost under attack": Broken(
        lambda: (classifier(4, bias=(0, 0, -1.5, 0)), split(48, 4)),
        "class lost under attack",
        "look closer",
        r"0 of 12 samples of class 2 \(c\)",
    ),
    "normalisation forgotten": Broken(_forgotten, "normalisation", words="8 of 16 .* 16 after normalising"),
    "normalisation done twice": Broken(_twice, "normalisation", words="15 of 24 .* 24 after undoing"),
    "labels shifted by one": Broken(
        lambda: (classifier(10), labelled(mixed(40, 10), (torch.arange(40) + 1) % 10)),
        "names of the classes",
        words=r"shifted by 1: the model's class 0 is labelled class 1 \(b\)",
    ),
    "labels permuted": Broken(
        lambda: (classifier(10), labelled(split(60, 10), torch.tensor(PERMUTED)[torch.arange(60) % 10])),
        "names of the classes",
        words=r"6 of 60 .* 60 if the model's class 1 is labelled class 3 \(d\)",
    ),
    "channels reversed": Broken(
        lambda: (nn.Sequential(Reversed(), classifier(4, 3)).eval(), split(40, 4, 3)), "other images", words="BGR"
    ),
    "images transposed": Broken(
        lambda: (nn.Sequential(Transposed(), classifier(4)).eval(), split(40, 4)), "other images", words="transposed"
    ),
}


class Collapsed(nn.Module):
    """Class 1 always wins, though every logit depends on the image."""

    def forward(self, z: Tensor) -> Tensor:
        return torch.stack([z[:, 0], z.logsumexp(dim=1) + 1, z[:, 2]], dim=1)


class Forgetful(nn.Module):
    """Class 2 never wins."""

    def forward(self, z: Tensor) -> Tensor:
        return torch.stack([z[:, 0], z[:, 1], -z[:, 2], z[:, 3]], dim=1)


class Reversed(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.flip(1)


class Transposed(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.transpose(2, 3)


# --- honest ones


def _unbalanced() -> tuple[nn.Module, ArraySplit]:
    label = (torch.arange(60) % 6 == 5).long()
    return classifier(2), ArraySplit.of(images(label), label, classes=named(2), layout="NCHW")


def _three_quarters() -> tuple[nn.Module, ArraySplit]:
    """A weak model: one image in four shows the pattern of the other class."""
    label = torch.arange(60) % 2
    shown = torch.where(torch.arange(60) % 8 >= 6, 1 - label, label)
    return classifier(2), ArraySplit.of(images(shown), label, classes=named(2), layout="NCHW")


def _part_robust(n: int, classes: int) -> tuple[nn.Module, ArraySplit]:
    """Half of the samples, of every class, have a contrast above eps, half of them one below."""
    contrast = 0.05 + 0.3 * ((torch.arange(n) // classes) % 2)
    return classifier(classes), split(n, classes, contrast=contrast)


HONEST: dict[str, Callable[[], tuple[nn.Module, ArraySplit]]] = {
    "two classes, 16 images": lambda: (classifier(2), split(16, 2)),
    "two classes, 24 images, half robust": lambda: _part_robust(24, 2),
    "two classes, 5 to 1, 60 images": _unbalanced,
    "two classes, 3 of 4 right, 60 images": _three_quarters,
    "three classes, 16 images": lambda: (classifier(3), split(16, 3)),
    "three classes, 60 images, half robust": lambda: _part_robust(60, 3),
    "three classes, 7 of 8 right, 40 images": lambda: (classifier(3), mixed(40, 3)),
    "three levels of grey, 24 images, normalised once": lambda: (
        models.normalized(Levels([-1.25, 0.0, 1.25]), [0.5], [0.32]).eval(),
        grey((0.1, 0.5, 0.9), (8, 9, 7)),
    ),
    "ten classes, 40 images": lambda: (classifier(10), split(40, 10)),
    "four classes in colour, 24 images": lambda: (classifier(4, 3), split(24, 4, 3)),
}
