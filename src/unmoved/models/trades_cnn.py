"""Make the small convolutional network of the MNIST experiments of TRADES."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Literal

from torch import nn

from unmoved.core.errors import UnmovedError, require_choice, require_number, require_whole
from unmoved.models.input_layers import entrance, require_sizes

_HIDDEN = 200
ACTIVATIONS = {"relu": nn.ReLU, "silu": nn.SiLU, "softplus": nn.Softplus}


def _side(size: int, padding: int) -> int:
    """Return the height or width that is left after the features: twice, two 3x3 convolutions and a halving."""
    for _ in range(2):
        size = (size - 4 + 4 * padding) // 2
    return size


def _pixels_left(height: int, breadth: int, padding: int) -> int:
    """Return how many pixels of a channel are left after the features; raise `UnmovedError` where there are none."""
    sides = _side(height, padding), _side(breadth, padding)
    if min(sides) < 1:
        smallest = next(n for n in range(1, 17) if _side(n, padding) >= 1)
        raise UnmovedError(
            f"small_cnn: expected images of at least {smallest}x{smallest} with padding={padding}, "
            f"came {height}x{breadth}; " + ("set padding=1" if min(height, breadth) >= 4 else "use mlp")
        )
    return sides[0] * sides[1]


def _classifier(inputs: int, num_classes: int, activation: str, dropout: float) -> OrderedDict[str, nn.Module]:
    return OrderedDict(
        {
            "fc1": nn.Linear(inputs, _HIDDEN),
            f"{activation}1": ACTIVATIONS[activation](),
            "drop": nn.Dropout(dropout),
            "fc2": nn.Linear(_HIDDEN, _HIDDEN),
            f"{activation}2": ACTIVATIONS[activation](),
            "fc3": nn.Linear(_HIDDEN, num_classes),
        }
    )


def small_cnn(
    shape: tuple[int, int, int],
    num_classes: int,
    *,
    dropout: float = 0.5,
    padding: int = 0,
    width: int = 32,
    activation: Literal["relu", "silu", "softplus"] = "relu",
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> nn.Sequential:
    """Make a SmallCNN: 3x3 convolutions w-w-pool-2w-2w-pool, then 200-200-K fully connected; (B, C, H, W) to (B, K).

    Zhang et al., "Theoretically Principled Trade-off between Robustness and Accuracy" (ICML 2019), with the
    initialisation of the authors' code: He normal in the convolutions, and weight and bias of the last layer zero.
    An untrained one thus gives the uniform prediction, and its gradient by the image is exactly zero. 312,202
    parameters for 1x28x28 images and 10 classes.

    Args:
        dropout: share of the first 200 units that is dropped in training (the one place the authors drop).
        padding: 0 as the authors, for images of 16x16 and more; 1 keeps the size, for images of 4x4 and more.
        width: channels of the first convolutions, 32 in the paper.
        activation: ``"relu"`` as the authors. ``"silu"``, z sigmoid(z), and ``"softplus"``, log(1 + exp z), are smooth:
            no unit is dead, so an attack's gradient misses less, in training too (Xie et al. 2020, "Smooth Adversarial
            Training", arXiv:2006.14536).

    Raises:
        UnmovedError: an image too small for the padding, or a setting out of its bounds; otherwise as `entrance`.
    """
    shape, num_classes = require_sizes(shape, num_classes)
    first = entrance(shape, num_classes, mean, std)
    dropout = require_number("dropout", dropout, at_least=0, at_most=1)
    padding = require_whole("padding", padding, at_least=0)
    width = require_whole("width", width, at_least=1)
    require_choice("activation", activation, ACTIVATIONS)
    channels, height, breadth = shape
    left = _pixels_left(height, breadth, padding)
    features: OrderedDict[str, nn.Module] = OrderedDict()
    for stage, (before, after) in enumerate(((channels, width), (width, 2 * width))):
        for k, source in ((2 * stage + 1, before), (2 * stage + 2, after)):
            features[f"conv{k}"] = nn.Conv2d(source, after, 3, padding=padding)
            features[f"{activation}{k}"] = ACTIVATIONS[activation]()
        features[f"pool{stage + 1}"] = nn.MaxPool2d(2)
    classifier = _classifier(2 * width * left, num_classes, activation, dropout)
    for layer in features.values():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight)
            nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
    for parameter in classifier["fc3"].parameters():
        nn.init.zeros_(parameter)
    return nn.Sequential(
        OrderedDict(
            first,
            features=nn.Sequential(features),
            flatten=nn.Flatten(),
            classifier=nn.Sequential(classifier),
        )
    )
