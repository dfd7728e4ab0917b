"""Define a batch of images with labels and identities, and type aliases for the tensors that the package passes on.

``Image`` (B, C, H, W) float in [0, 1]; ``Label`` and ``Index`` (B,) int64; ``Logits`` (B, K); ``PerSample`` (B,). A
model is any ``nn.Module`` that maps Image to Logits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, TypeAlias

import torch
from torch import Tensor

from unmoved.core.errors import UnmovedError

if TYPE_CHECKING:
    import pandas as pd

Image: TypeAlias = Tensor
Label: TypeAlias = Tensor
Index: TypeAlias = Tensor
Logits: TypeAlias = Tensor
PerSample: TypeAlias = Tensor
Table: TypeAlias = "pd.DataFrame"


def per_image(values: PerSample, x: Image) -> Tensor:
    """Reshape values (B,) so that they broadcast over the images ``x`` (B, ...)."""
    return values.reshape(-1, *[1] * (x.ndim - 1))


@dataclass(frozen=True, eq=False)
class Batch:
    """Images with labels and identities.

    Attributes:
        x: (B, C, H, W) float, images in [0, 1].
        y: (B,) int64, labels.
        index: (B,) int64, the identity of each sample, which never changes; 0..B-1 by default. Keys noise and memory.
        step: the optimizer step, set by the training loop; with ``index`` it keys the noise.
        target: (B,) int64, the class that a targeted attack aims at; None for an untargeted one.
        other: (B,) int64, the second label of images mixed from two, as by `data.CutMix`; None for ordinary images.
        share: (B,) float in [0, 1], the part of each image that has the label ``y``; None without ``other``.

    Raises:
        UnmovedError: images or labels of the wrong shape or type.
    """

    x: Image
    y: Label
    index: Index = field(default=None)  # type: ignore[assignment]
    step: int = 0
    target: Label | None = None
    other: Label | None = None
    share: PerSample | None = None

    def __post_init__(self) -> None:
        for name, value in (("x", self.x), ("y", self.y), ("index", self.index)):
            if not isinstance(value, Tensor) and not (name == "index" and value is None):
                raise UnmovedError(f"Batch.{name}: expected a tensor, came {type(value).__name__}; use torch.as_tensor")
        if self.index is None and self.y.ndim:
            object.__setattr__(self, "index", torch.arange(len(self.y), device=self.y.device))
        if not self.x.is_floating_point() or self.x.ndim < 2:
            raise UnmovedError(
                f"Batch.x: expected float images (B, C, H, W) in [0, 1], came {self.x.dtype} {tuple(self.x.shape)}; "
                "convert with images.float() / 255"
            )
        if self.y.dtype != torch.int64 or self.y.ndim != 1 or len(self.y) != len(self.x):
            raise UnmovedError(
                f"Batch.y: expected int64 labels of shape ({len(self.x)},), "
                f"came {self.y.dtype} {tuple(self.y.shape)}; convert with labels.long()"
            )
        if self.index.dtype != torch.int64 or self.index.shape != self.y.shape:
            raise UnmovedError(
                f"Batch.index: expected int64 of shape {tuple(self.y.shape)}, "
                f"came {self.index.dtype} {tuple(self.index.shape)}"
            )
        for name, classes in (("target", self.target), ("other", self.other)):
            if classes is not None and (classes.dtype != torch.int64 or classes.shape != self.y.shape):
                raise UnmovedError(
                    f"Batch.{name}: expected int64 classes of shape {tuple(self.y.shape)}, "
                    f"came {classes.dtype} {tuple(classes.shape)}"
                )
        if (self.other is None) != (self.share is None):
            raise UnmovedError(
                "Batch.other, Batch.share: expected both or neither, came one; share is the part of y, the rest other's"
            )
        if self.share is not None and (not self.share.is_floating_point() or self.share.shape != self.y.shape):
            raise UnmovedError(
                f"Batch.share: expected floats of shape {tuple(self.y.shape)}, "
                f"came {self.share.dtype} {tuple(self.share.shape)}"
            )

    def __len__(self) -> int:
        return len(self.y)

    def to(self, device: torch.device | str) -> Batch:
        """Return the same samples on another device."""
        return self.map(lambda tensor: tensor.to(device))

    def take(self, which: Tensor) -> Batch:
        """Select samples by a mask or by positions; identities and step stay."""
        return self.map(lambda tensor: tensor[which])

    @property
    def largest(self) -> Label:
        """Return the label (B,) of the larger part of each image; ``y`` if the parts are equal or nothing is mixed."""
        return self.y if self.other is None or self.share is None else torch.where(self.share < 0.5, self.other, self.y)

    def map(self, change: Callable[[Tensor], Tensor]) -> Batch:
        """Apply a function to every tensor."""
        target, other, share = (None if t is None else change(t) for t in (self.target, self.other, self.share))
        x, y, index = (change(tensor) for tensor in (self.x, self.y, self.index))
        return replace(self, x=x, y=y, index=index, target=target, other=other, share=share)
