"""What images, labels and losses have to be before anything is computed with them: one gate for the whole package."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

from unmoved.errors import UnmovedError

# By how much of the box's width rounding, such as that of a resized image, may carry a pixel outside.
TOLERANCE = 1e-6
_without_waiting: ContextVar[bool] = ContextVar("without_waiting", default=False)


@contextmanager
def without_waiting() -> Iterator[None]:
    """Inside, values on a device other than the CPU are taken on trust: to look at them is to wait for the device."""
    token = _without_waiting.set(True)
    try:
        yield
    finally:
        _without_waiting.reset(token)


def _may_look(values: Tensor) -> bool:
    return values.numel() > 0 and (values.device.type == "cpu" or not _without_waiting.get())


def require_images(x: Tensor, bounds: tuple[float, float] = (0.0, 1.0), where: str = "images") -> None:
    """Raise `UnmovedError` unless every pixel is a number within ``bounds``.

    Args:
        x: images of a floating type; one pass over them, about a millionth of a second for a thousand pixels.
        bounds: smallest and largest valid pixel value; `TOLERANCE` of the width is allowed on both sides.
        where: what the message calls the images.
    """
    if not _may_look(x):
        return
    (low, high), (least, most) = bounds, (value.item() for value in torch.aminmax(x.detach()))
    slack = TOLERANCE * (high - low)
    if least >= low - slack and most <= high + slack:
        return
    raise UnmovedError(
        f"{where}: expected pixels in [{low:g}, {high:g}], came {least:g} to {most:g}; " + _cause(x, low, high)
    )


def _cause(x: Tensor, low: float, high: float) -> str:
    """What most likely happened to images outside [low, high], and what to do."""
    finite = x.detach()[torch.isfinite(x)]
    if len(finite) < x.numel():
        return (
            f"{x.numel() - len(finite)} of {x.numel()} are NaN or infinite: look for a division by zero where the "
            "images are made"
        )
    least, most, width = finite.min().item(), finite.max().item(), high - low
    if least > low - 0.02 * width and most < high + 0.02 * width:
        return f"they are just outside, as after a resize or an augmentation: use images.clamp({low:g}, {high:g})"
    if least >= 0 and high <= 1:
        return f"they look like images of {'0..255: divide by 255' if most <= 255 else '16 bits: divide by 65535'}"
    return (
        "they look normalised: hand over the images as they were before, and put the normalisation inside the model, "
        "as models.normalized(model, mean, std) does; eps is then in units of pixels"
    )


def require_labels(y: Tensor, num_classes: int | None = None, where: str = "labels") -> None:
    """Raise `UnmovedError` unless every label is in 0..num_classes - 1 (is not negative, where that is not known).

    Args:
        y: (B,) labels of an integer type.
        num_classes: how many logits there are.
        where: what the message calls the labels.
    """
    if not _may_look(y):
        return
    least, most = (int(value) for value in torch.aminmax(y.detach()))
    if least < 0:
        expected = "0..K-1" if num_classes is None else f"0..{num_classes - 1}"
        raise UnmovedError(
            f"{where}: expected {expected}, came {least}; number the classes from 0 and leave out samples without one"
        )
    if num_classes is not None and most >= num_classes:
        raise UnmovedError(
            f"{where}: expected 0..{num_classes - 1} for {num_classes} logits, came {most}; give the model a logit for "
            "each class, or number the classes from 0"
        )


def require_per_sample(values: object, size: int, name: str) -> None:
    """Raise `UnmovedError` unless ``values`` is a floating tensor of shape (size,): a number for each sample.

    Args:
        values: what a term returned.
        size: number of samples.
        name: what the message calls the term.
    """
    if isinstance(values, Tensor) and values.shape == (size,) and values.is_floating_point():
        return
    came = f"{values.dtype} of shape {tuple(values.shape)}" if isinstance(values, Tensor) else type(values).__name__
    advice = "return a tensor with the value of each sample"
    if isinstance(values, Tensor) and values.is_floating_point():
        if values.ndim == 0:
            advice = 'that looks like a mean over the batch: leave the mean out, as reduction="none" does in torch'
        elif values.numel() == size:
            advice = "use values.squeeze() or values.flatten()"
        elif math.prod(values.shape[:1]) == size:
            advice = "sum over the classes, as values.sum(dim=1) does"
    raise UnmovedError(f"{name}: expected a loss of each sample, floats of shape ({size},), came {came}; {advice}")
