"""Collect images that arrive a few at a time in one tensor, without ever holding them twice."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from unmoved.core.errors import UnmovedError, require_choice
from unmoved.core.preconditions import require_images

Array: TypeAlias = "Tensor | np.ndarray"
CHANNELS = (1, 2, 3, 4)
LAYOUTS = ("NCHW", "NHWC")
PIECE = 2**22  # bytes that are converted at a time


class Filling:
    """Hold ``count`` images; as uint8 while every pixel is k/255, as float32 from the first that is not.

    Args:
        what: the name of these images in messages.
        shape: of the array they come from, (N, H, W), (N, C, H, W) or (N, H, W, C).
        count: how many will be put in; N by default.
        layout: ``"NCHW"`` or ``"NHWC"``, needed where the shape alone does not tell.

    Raises:
        UnmovedError: a shape that is none of these, or no pixel; uint8 images of zeros and ones.
    """

    def __init__(
        self,
        what: str,
        shape: Sequence[int],
        *,
        count: int | None = None,
        layout: str | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        if layout is not None:
            require_choice(f"{what}: layout", layout, LAYOUTS)
        self._what, self._last, self._filled = what, _channels_last(what, tuple(shape), layout), 0
        if math.prod(shape) == 0:
            raise UnmovedError(f"{what}: expected at least one image of at least one pixel, came shape {tuple(shape)}")
        sides = tuple(shape[1:]) if len(shape) == 4 else (1, *shape[1:])
        self.shape = (sides[2], sides[0], sides[1]) if self._last else (sides[0], sides[1], sides[2])
        self._count, self._device = shape[0] if count is None else count, device
        self._images: Tensor | None = None
        self._brightest = 0  # of what came as uint8

    def put(self, values: Tensor) -> None:
        """Copy the next images, in the layout of their array.

        Raises:
            UnmovedError: no uint8 and no floats, or pixels outside [0, 1]; with the last images, as `require_light`.
        """
        if len(values) == 0:
            return
        if values.dtype != torch.uint8:
            if not values.is_floating_point():
                raise UnmovedError(
                    f"{self._what}: expected uint8 (0..255) or float in [0, 1], came {values.dtype}; "
                    "convert whole numbers 0..255 to uint8"
                )
            require_images(values, where=self._what)
            values = values.float()
            levels = (values * 255).round()
            values = levels.to(torch.uint8) if torch.equal(levels / 255, values) else values
            self._brightest = 255  # the scale of floats is known
        elif self._brightest < 2:
            self._brightest = max(self._brightest, int(values.max()))
        values = values.permute(0, 3, 1, 2) if self._last else values.reshape(len(values), *self.shape)
        room, end = self._room(values.dtype), self._filled + len(values)
        room[self._filled : end] = values if values.dtype == room.dtype else values.float() / 255
        self._filled = end
        if self._filled == self._count:
            require_light(self._what, self._brightest)

    @property
    def images(self) -> Tensor:
        """Return (count, C, H, W): the images put in so far, and room for the rest."""
        return self._room(torch.uint8) if self._images is None else self._images

    def _room(self, dtype: torch.dtype) -> Tensor:
        if self._images is None:
            self._images = torch.empty((self._count, *self.shape), dtype=dtype, device=self._device)
        elif dtype == torch.float32 and self._images.dtype == torch.uint8:  # the images before this one fit into uint8
            wider = torch.empty(self._images.shape, dtype=torch.float32, device=self._device)
            torch.div(self._images[: self._filled], 255, out=wider[: self._filled])
            self._images = wider
        return self._images


def require_light(what: str, brightest: int) -> None:
    """Raise `UnmovedError` where the brightest of all uint8 pixels is 1: white, where 255 is white, would be black."""
    if brightest == 1:
        raise UnmovedError(
            f"{what}: expected uint8 pixels of 0..255, came none above 1; if 1 is white, hand the images over as floats"
        )


def pieces(values: Array) -> Iterator[Tensor]:
    """Iterate over a numeric numpy array or a tensor, a few megabytes at a time, as tensors."""
    step = max(1, PIECE // max(1, values[:1].nbytes))
    for start in range(0, len(values), step):
        yield as_own(values[start : start + step])


def as_own(values: Array) -> Tensor:
    """Convert to a tensor; a numpy array is copied, in this machine's byte order."""
    if isinstance(values, Tensor):
        return values.detach()
    if (
        values.dtype == np.uint64
    ):  # torch supports little of unsigned types; a label that wraps is negative, and refused
        values = values.astype(np.int64)
    return torch.from_numpy(np.array(values, dtype=values.dtype.newbyteorder("="), order="C"))


def _channels_last(what: str, shape: tuple[int, ...], layout: str | None) -> bool:
    if len(shape) == 3:
        return False
    if len(shape) != 4:
        expected = "(N, H, W), (N, C, H, W) or (N, H, W, C)"
        raise UnmovedError(f"{what}: expected shape {expected}, came {shape}; reshape them")
    if layout is not None:
        return layout == "NHWC"
    first, last = shape[1] in CHANNELS, shape[3] in CHANNELS
    if first == last:
        raise UnmovedError(
            f"{what}: shape {shape} may be (N, C, H, W) or (N, H, W, C): expected 1 to 4 channels in one of the two "
            'places; say layout="NCHW" or layout="NHWC"'
        )
    return not first
