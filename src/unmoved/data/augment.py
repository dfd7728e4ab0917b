"""Augment images: ``augment(batch, seed)`` returns a batch with moved images and the same labels.

The noise is keyed by (seed, step, identity), so what happens to a sample does not depend on who else is in its batch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Protocol

import torch
from torch.nn import functional

from unmoved.core import noise
from unmoved.core.batch import Batch
from unmoved.core.errors import UnmovedError, number_field, require_choice, whole_field

MODES = {"zeros": "constant", "reflect": "reflect"}
# Streams far from those of the attacks: the same seed must not make an attack's start follow the augmentation.
CROP, FLIP, CUTOUT = 0xC409, 0xF119, 0xC070


class Augmentation(Protocol):
    """Move each image of a batch within what its label allows. Pure."""

    def __call__(self, batch: Batch, seed: int) -> Batch: ...


@dataclass(frozen=True)
class PadCrop:
    """Pad every side, then cut a window of the old size at a random place: a shift of up to ``pad`` pixels.

    Args:
        pad: pixels added on each side.
        mode: ``"zeros"`` or ``"reflect"``.

    Raises:
        UnmovedError: a negative pad, an unknown mode, or reflection further than the image reaches.
    """

    pad: int = 4
    mode: str = "zeros"

    def __post_init__(self) -> None:
        whole_field(self, "crop.pad", at_least=0)
        require_choice("crop.mode", self.mode, MODES)

    def __call__(self, batch: Batch, seed: int) -> Batch:
        x, places = batch.x, 2 * self.pad + 1
        if self.mode == "reflect" and self.pad >= min(x.shape[-2:]):
            raise UnmovedError(
                f"crop.pad: expected less than the image side with reflection, came {self.pad} for images "
                f"{tuple(x.shape[1:])}; use a smaller pad"
            )
        padded = functional.pad(x, (self.pad,) * 4, mode=MODES[self.mode])
        windows = padded.unfold(2, x.shape[2], 1).unfold(3, x.shape[3], 1)  # a view: (B, C, places, places, H, W)
        draw = noise.uniform(batch.index, (2,), seed=seed, step=batch.step, stream=CROP)
        top, left = (draw * places).long().clamp_max(2 * self.pad).unbind(1)  # rounding may reach ``places``
        return replace(batch, x=windows[torch.arange(len(x), device=x.device), :, top, left])


@dataclass(frozen=True)
class Flip:
    """Mirror left and right with probability ``p``.

    Raises:
        UnmovedError: p outside [0, 1].
    """

    p: float = 0.5

    def __post_init__(self) -> None:
        number_field(self, "flip.p", at_least=0, at_most=1)

    def __call__(self, batch: Batch, seed: int) -> Batch:
        draw = noise.uniform(batch.index, (1, 1, 1), seed=seed, step=batch.step, stream=FLIP)
        return replace(batch, x=torch.where(draw < self.p, batch.x.flip(-1), batch.x))


@dataclass(frozen=True)
class Cutout:
    """Cover a square of each image with grey: DeVries and Taylor 2017 (arXiv 1708.04552), section 3.1.

    The middle of the square is any pixel, each as likely, so that part of it may lie beyond the edge.

    Args:
        size: side of the square in pixels; ``None`` is half the shorter side of the image, 16 on CIFAR-10 as there.
        fill: value of the covered pixels.

    Raises:
        UnmovedError: a size below 1, or a fill outside [0, 1].

    Deviations: ``fill`` is 0.5 where the paper has the mean of the data, which its normalisation makes zero (0.47 on
    CIFAR-10).
    """

    size: int | None = None
    fill: float = 0.5

    def __post_init__(self) -> None:
        if self.size is not None:
            whole_field(self, "cutout.size", at_least=1)
        number_field(self, "cutout.fill", at_least=0, at_most=1)

    def __call__(self, batch: Batch, seed: int) -> Batch:
        height, width = batch.x.shape[-2:]
        size = max(min(height, width) // 2, 1) if self.size is None else self.size
        draw = noise.uniform(batch.index, (2,), seed=seed, step=batch.step, stream=CUTOUT)
        is_covered = []
        for place, side in enumerate((height, width)):
            first = (draw[:, place] * side).long().clamp_max(side - 1) - size // 2  # rounding may reach ``side``
            pixel = torch.arange(side, device=batch.x.device) - first[:, None]
            is_covered.append((pixel >= 0) & (pixel < size))
        mask = (is_covered[0][:, :, None] & is_covered[1][:, None, :])[:, None]
        return replace(batch, x=batch.x.masked_fill(mask, self.fill))


@dataclass(frozen=True, init=False, repr=False)
class Chain:
    """Apply one augmentation after another, each with its own noise; ``Chain()`` changes nothing.

    Chains of chains are flat: ``Chain(Chain(a, b), c) == Chain(a, b, c)``.
    """

    parts: tuple[Augmentation, ...]

    def __init__(self, *parts: Augmentation) -> None:
        flat: list[Augmentation] = []
        for part in parts:
            flat += part.parts if isinstance(part, Chain) else [part]
        object.__setattr__(self, "parts", tuple(flat))

    def __repr__(self) -> str:
        return f"Chain({', '.join(map(repr, self.parts))})"

    def __call__(self, batch: Batch, seed: int) -> Batch:
        for place, part in enumerate(self.parts):
            batch = part(batch, seed + (place << 40))  # otherwise the second of two flips would undo the first
        return batch


_PARTS: dict[str, Callable[[], Augmentation]] = {"crop": PadCrop, "flip": Flip, "cutout": Cutout}
# Every choice of the parts, in this order: none, crop, ..., crop-flip-cutout.
_NAMED = {"-".join(names) or "none": names for count in range(len(_PARTS) + 1) for names in combinations(_PARTS, count)}


def augmentation(name: str) -> Augmentation:
    """Return the augmentation that recipes call ``name``: none, or crop, flip and cutout joined, as in crop-flip.

    Raises:
        UnmovedError: an unknown name.
    """
    require_choice("augment", name, _NAMED)
    parts = [_PARTS[part]() for part in _NAMED[name]]
    return parts[0] if len(parts) == 1 else Chain(*parts)
