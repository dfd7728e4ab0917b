"""Augment images: ``augment(batch, seed)`` returns a batch with moved images and the same labels, or mixed ones.

The noise is keyed by (seed, step, identity), so a sample is augmented in the same way in any batch.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import combinations
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.nn import functional

from unmoved.core import noise
from unmoved.core.batch import Batch
from unmoved.core.errors import UnmovedError, number_field, require_choice, whole_field
from unmoved.core.protocols import Split

MODES = {"zeros": "constant", "reflect": "reflect"}
# Streams far from those of the attacks: with equal seeds, starts and augmentations must not be correlated.
CROP, FLIP, CUTOUT, CUTMIX = 0xC409, 0xF119, 0xC070, 0xC3A1


class Augmentation(Protocol):
    """Move each image of a batch within what its label allows. Pure."""

    def __call__(self, batch: Batch, seed: int) -> Batch: ...


@runtime_checkable
class DrawsPartners(Protocol):
    """An augmentation that also reads training samples outside the batch, and must be given the training data."""

    def over(self, split: Split) -> Augmentation:
        """Return the same augmentation with this training data."""
        ...


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

    Deviations: ``fill`` is 0.5; the paper fills with the mean of the data, which is zero after its normalisation
    (0.47 on CIFAR-10).
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

    def over(self, split: Split) -> Chain:
        """Return the same chain, whose parts have the training data if they read it."""
        return Chain(*(part.over(split) if isinstance(part, DrawsPartners) else part for part in self.parts))

    def __call__(self, batch: Batch, seed: int) -> Batch:
        for place, part in enumerate(self.parts):
            batch = part(batch, seed + (place << 40))  # otherwise the second of two flips would undo the first
        return batch


@runtime_checkable
class _Selects(Protocol):
    def __len__(self) -> int: ...

    def select(self, positions: Tensor) -> Split: ...


@dataclass(frozen=True)
class CutMix:
    """Paste a box of another training image, and share the label by area: Yun et al. 2019 (arXiv 1905.04899).

    ``x = M x_A + (1 - M) x_B`` and ``y = s y_A + (1 - s) y_B`` (eq. 1), the mask M zero in a box with sides
    ``W sqrt(1 - lambda)`` and ``H sqrt(1 - lambda)`` (eq. 2) around a uniform place, cut off at the edges and rounded,
    lambda uniform in [0, 1] (alpha = 1). The share s is counted in pixels, as in the last lines of algorithm 1. Labels
    become ``Batch.y``, ``other`` and ``share``; the values of terms are mixed by the share.

    `over` gives it the training data, as `train` does before the first step.

    Args:
        before: the augmentation of both images, each with its own noise, before they are mixed. Other augmentations
            must be given here: after mixing, they would change the areas but not the shares.
        data: the data that partners are drawn from.

    Raises:
        UnmovedError: data of which samples cannot be selected, no data, or images that are mixed already.

    Deviations: the partner is drawn from all the training data, not from the batch, so that it depends on (seed, step,
    identity) alone; each sample has a box of its own, where the authors' code has one a batch; and every sample is
    mixed, while that code leaves out batches at a given rate.
    """

    before: Augmentation = Chain()
    data: _Selects | None = field(default=None, kw_only=True, repr=False, compare=False)

    def over(self, split: Split) -> CutMix:
        """Return the same augmentation with this training data to draw partners from."""
        if not isinstance(split, _Selects):
            raise UnmovedError(
                "cutmix: expected training data of which samples are selected by position, select(positions) -> split, "
                f"came {type(split).__name__}; make a data.ArraySplit.of(images, labels), or leave cutmix out"
            )
        before = self.before.over(split) if isinstance(self.before, DrawsPartners) else self.before
        return replace(self, before=before, data=split)

    def __call__(self, batch: Batch, seed: int) -> Batch:
        if self.data is None:
            raise UnmovedError(
                "cutmix: expected training data to draw partners from, came none; use CutMix().over(data)"
            )
        draw = noise.uniform(batch.index, (5,), seed=seed, step=batch.step, stream=CUTMIX)
        rows = positions(draw[:, 0], draw[:, 1], len(self.data))
        partner = next(self.data.select(rows).batches(len(rows))).to(batch.x.device)
        batch, partner = self.before(batch, seed), self.before(replace(partner, step=batch.step), seed)
        if batch.share is not None:
            raise UnmovedError("cutmix: expected images that are not mixed yet, came mixed ones; use it once")
        is_pasted, share = _boxes(draw[:, 2:], *batch.x.shape[-2:])
        x = torch.where(is_pasted, partner.x.to(batch.x.dtype), batch.x)
        return replace(batch, x=x, other=partner.y, share=share)


def positions(high: Tensor, low: Tensor, count: int) -> Tensor:
    """Turn two draws of 24 bits into uniform positions below ``count``, (B,); one is too coarse for millions."""
    high, low = ((draw * 2**24).long() for draw in (high, low))
    return (high * count + (low * count >> 24)) >> 24


def _boxes(draw: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Turn draws (B, 3) of lambda and of the middle into boxes, (B, 1, H, W) bool, and the shares left, (B,)."""
    size = (1 - draw[:, 0]).sqrt()
    inside = []
    for place, side in ((draw[:, 1], height), (draw[:, 2], width)):
        first = (side * (place - size / 2)).clamp_min(0).round()
        beyond = (side * (place + size / 2)).clamp_max(side).round()
        pixel = torch.arange(side, device=draw.device)
        inside.append((pixel >= first[:, None]) & (pixel < beyond[:, None]))
    rows, columns = inside
    share = 1 - rows.sum(dim=1) * columns.sum(dim=1) / (height * width)
    return (rows[:, :, None] & columns[:, None, :])[:, None], share


_PARTS: dict[str, Callable[..., Augmentation]] = {"crop": PadCrop, "flip": Flip, "cutout": Cutout, "cutmix": CutMix}
# Every choice of the parts, in this order: none, crop, ..., crop-flip-cutout-cutmix.
_NAMED = {"-".join(names) or "none": names for count in range(len(_PARTS) + 1) for names in combinations(_PARTS, count)}
_SIZED = re.compile(r"\b(crop|cutout)(\d{1,2})\b")


def augmentation(name: str) -> Augmentation:
    """Return the augmentation that recipes call ``name``: none, or crop, flip, cutout, cutmix joined by hyphens.

    Parts before cutmix are applied to both images before they are mixed. A number after crop or cutout is its size in
    pixels, if it is not the default: ``crop2-flip`` pads by two.

    Raises:
        UnmovedError: an unknown name; a cutout of no pixel.
    """
    sizes, bare = dict(_SIZED.findall(name)), _SIZED.sub(r"\1", name)
    if bare not in _NAMED:
        require_choice("augment", name, _NAMED)
    names = _NAMED[bare]
    parts = [_PARTS[part](*([int(sizes[part])] if part in sizes else [])) for part in names if part != "cutmix"]
    before = parts[0] if len(parts) == 1 else Chain(*parts)
    return CutMix(before) if "cutmix" in names else before
