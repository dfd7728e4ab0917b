"""Follow a changed window of an image through layers with small kernels: which outputs it reaches, and their inputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

Pair = tuple[int, int]

# Costs in units of one multiplication: to write one number, and to call the functions of one stretch.
WRITING, CALLING = 16, 300_000


@dataclass(frozen=True)
class Layer:
    """One operation on images, each of whose outputs is computed from a window of its input.

    Attributes:
        function: called as ``function(images, *args, **kwargs)``.
        shape: (channels, height, width) of the whole result.
        local: the same function without padding, for a patch; None if the layer does not pad.
        kernel, stride, padding: (height, width) each; the kernel with its dilation.
        work: multiplications for one position of the result, all channels.
    """

    function: Callable[..., Tensor]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    shape: tuple[int, int, int]
    local: Callable[[Tensor], Tensor] | None = None
    kernel: Pair = (1, 1)
    stride: Pair = (1, 1)
    padding: Pair = (0, 0)
    work: int = 0

    def __call__(self, x: Tensor) -> Tensor:
        """Compute whole images."""
        return self.function(x, *self.args, **self.kwargs)

    def patch(self, x: Tensor) -> Tensor:
        """Compute a patch that includes its surroundings."""
        return self(x) if self.local is None else self.local(x)

    def cost(self, height: int, width: int) -> int:
        """Return what so many positions of the result cost, in multiplications."""
        return height * width * (self.work + WRITING * self.shape[0])


@dataclass
class Reach:
    """The positions that windows of one side influence, along one axis, in the image and after each layer.

    Attributes:
        starts: for the image and each layer, (places of the window,) int64, the first influenced position.
        sizes: for the same, the largest number of influenced positions; starts are such that it fits into the map.
    """

    starts: list[Tensor]
    sizes: list[int]

    @classmethod
    def of(cls, layers: Sequence[Layer], axis: int, length: int, side: int) -> Reach:
        """Follow each place of a window of this side along an axis (0 height, 1 width) of this length."""
        first = torch.arange(length - side + 1)
        last = first + side - 1
        reach = cls([first], [side])
        for layer in layers:
            kernel, stride, padding = layer.kernel[axis], layer.stride[axis], layer.padding[axis]
            length = layer.shape[1 + axis]
            # Output o is computed from the inputs o stride - padding + (0 .. kernel - 1).
            first = (-((kernel - 1 - padding - first) // stride)).clamp(0, length - 1)
            last = ((last + padding) // stride).clamp(0, length - 1)
            size = max(int((last - first).max()) + 1, 1)
            reach.starts.append(first.clamp_max(length - size))
            reach.sizes.append(size)
        return reach


@dataclass
class Stretch:
    """Consecutive layers, computed only where a window reaches: a patch of their input becomes one of their output.

    Attributes:
        inputs, outputs: (height, width) of (places of the window, positions) int64: the rows, times the width of the
            whole maps, and the columns of the patches within these; those outside are moved to the border.
        inside: for each layer that pads, the same of float, 0 at positions outside its input and else 1.
    """

    layers: Sequence[Layer]
    shape: tuple[int, int, int]
    inputs: list[Tensor] = field(default_factory=list)
    outputs: list[Tensor] = field(default_factory=list)
    inside: list[list[Tensor]] = field(default_factory=list)

    @classmethod
    def of(
        cls, layers: Sequence[Layer], first: int, end: int, reaches: Sequence[Reach], shape: tuple[int, ...]
    ) -> Stretch:
        """Make the stretch of layers ``first .. end - 1``; ``shape`` is that of the image."""
        shapes = [(shape[0], shape[1], shape[2]), *(layer.shape for layer in layers)]
        made = cls(layers[first:end], shapes[end], inside=[[] for _ in range(first, end)])
        for axis, reach in enumerate(reaches):
            start, size = reach.starts[end], reach.sizes[end]
            # Each row is numbered by its first position.
            made.outputs.append(_positions(start, size) * (shapes[end][2] if axis == 0 else 1))
            for k in reversed(range(first, end)):
                layer = layers[k]
                start = start * layer.stride[axis] - layer.padding[axis]
                size = (size - 1) * layer.stride[axis] + layer.kernel[axis]
                positions = _positions(start, size)
                length = shapes[k][1 + axis]
                if max(layer.padding):
                    made.inside[k - first].append(((positions >= 0) & (positions < length)).float())
            made.inputs.append(positions.clamp(0, length - 1) * (shapes[first][2] if axis == 0 else 1))
        return made

    def __call__(self, whole: Tensor, top: Tensor, left: Tensor) -> tuple[Tensor, Tensor]:
        """Compute the outputs that windows at these places influence.

        Args:
            whole: (n, H, W, C), the input of the first layer.
            top, left: (n,) int64, the places of the windows in the image.

        Returns:
            (n, m, C'): the outputs. (n, m) int64: where they are among all positions of (n, H', W').
        """
        height, width, channels = whole.shape[1:]
        places = _numbers(self.inputs, top, left, height * width)
        x = whole.view(-1, channels).index_select(0, places.flatten()).view(*places.shape, channels).permute(0, 3, 1, 2)
        for layer, inside in zip(self.layers, self.inside, strict=True):
            if inside:
                rows, columns = (part.index_select(0, place) for part, place in zip(inside, (top, left), strict=True))
                x = x * (rows[:, None, :, None] * columns[:, None, None, :]).to(x.dtype)
            x = layer.patch(x)
        where = _numbers(self.outputs, top, left, self.shape[1] * self.shape[2]).flatten(1)
        return x.permute(0, 2, 3, 1).flatten(1, 2), where

    @staticmethod
    def cost(layers: Sequence[Layer], first: int, end: int, reaches: Sequence[Reach], shape: tuple[int, ...]) -> int:
        """Return what the layers ``first .. end - 1`` cost in patches, with a copy of the whole output."""
        sizes, total = [reach.sizes[end] for reach in reaches], CALLING
        channels, height, width = layers[end - 1].shape
        total += WRITING * channels * (height * width + sizes[0] * sizes[1])
        for k in reversed(range(first, end)):
            total += layers[k].cost(sizes[0], sizes[1])
            sizes = [
                (size - 1) * stride + kernel
                for size, stride, kernel in zip(sizes, layers[k].stride, layers[k].kernel, strict=True)
            ]
        return total + WRITING * (layers[first - 1].shape if first else shape)[0] * sizes[0] * sizes[1]


def stretches(layers: Sequence[Layer], shape: tuple[int, ...], side: int, worth: float = 0.75) -> list[Stretch]:
    """Choose which of the first layers are computed in patches, and where whole maps are kept between them.

    Args:
        layers: the first layers of a network, each on the output of the one before.
        shape: (C, H, W) of the image.
        side: of the window that changes.
        worth: patches are used if they cost at most this share of the whole layers.

    Returns:
        The stretches, from the first layer on; none where no choice is worth it.
    """
    reaches = [Reach.of(layers, axis, shape[1 + axis], side) for axis in (0, 1)]
    whole = [layer.cost(*layer.shape[1:]) for layer in layers]
    best, came = [0], [0]
    for end in range(1, len(layers) + 1):
        costs = [best[first] + Stretch.cost(layers, first, end, reaches, shape) for first in range(end)]
        best.append(min(costs))
        came.append(costs.index(best[-1]))
    totals = [cost + sum(whole[end:]) for end, cost in enumerate(best)]
    end = totals.index(min(totals))
    chosen: list[Stretch] = []
    while end and min(totals) <= worth * sum(whole):
        chosen.insert(0, Stretch.of(layers, came[end], end, reaches, shape))
        end = came[end]
    return chosen


def _positions(start: Tensor, size: int) -> Tensor:
    return start[:, None] + torch.arange(size)


def _numbers(axes: Sequence[Tensor], top: Tensor, left: Tensor, size: int) -> Tensor:
    """Number the positions (n, rows, columns) of patches among those of n maps of this size."""
    rows, columns = axes[0].index_select(0, top), axes[1].index_select(0, left)
    rows += torch.arange(0, len(top) * size, size)[:, None]
    return rows[:, :, None] + columns[:, None, :]
