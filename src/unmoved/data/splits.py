"""Images and labels held in memory (or on the device) as one tensor each; batches are slices or gathers of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from unmoved.data.checks import as_classes, as_images, as_labels, held_out, seeded
from unmoved.errors import UnmovedError, require_whole
from unmoved.protocols import Batch, Image, Index, Label


@dataclass(frozen=True, eq=False, repr=False)
class ArraySplit:
    """A part of a data set as tensors; `of` makes one from a user's arrays and checks every value.

    Attributes:
        images: (N, C, H, W) uint8, pixel = value / 255; or float32 in [0, 1], where 255 levels would not be exact.
        labels: (N,) int64, 0..K-1.
        index: (N,) int64, a sample's identity for ever.
        classes: the K class names.
        name: how tables and messages call it.

    Raises:
        UnmovedError: tensors of another shape or type.
    """

    images: Tensor
    labels: Label
    index: Index
    classes: tuple[str, ...]
    name: str = "data"

    def __post_init__(self) -> None:
        if self.images.ndim != 4 or self.images.dtype not in (torch.uint8, torch.float32):
            raise UnmovedError(
                f"{self.name}: expected images (N, C, H, W) of uint8 or float32, came {self.images.dtype} "
                f"{tuple(self.images.shape)}; ArraySplit.of(images, labels) converts"
            )
        for what, values in (("labels", self.labels), ("index", self.index)):
            if values.dtype != torch.int64 or values.shape != self.images.shape[:1]:
                raise UnmovedError(
                    f"{self.name}: expected {what} of int64, shape ({len(self.images)},), "
                    f"came {values.dtype} {tuple(values.shape)}; ArraySplit.of(images, labels) converts"
                )

    @staticmethod
    def of(
        images: Any,
        labels: Any,
        *,
        classes: Sequence[str] | None = None,
        index: Any = None,
        name: str = "data",
        layout: str | None = None,
    ) -> ArraySplit:
        """A split of a copy of numpy arrays or tensors.

        Args:
            images: uint8 0..255 or float in [0, 1]; (N, H, W), (N, C, H, W) or (N, H, W, C).
            labels: (N,) of an integer type, 0..K-1.
            classes: K names; ``"0"``, ``"1"``, ... unless given.
            index: (N,) distinct identities; 0..N-1 unless given.
            layout: ``"NCHW"`` or ``"NHWC"``, needed where the shape alone does not tell.

        Raises:
            UnmovedError: pixels outside [0, 1], NaN, a shape, a type or a label that does not fit.
        """
        pixels = as_images(f"{name} images", images, layout)
        y = as_labels(f"{name} labels", labels, len(pixels)).to(pixels.device)
        names = as_classes(f"{name} classes", classes, int(y.max()))
        if index is None:
            return ArraySplit(pixels, y, torch.arange(len(y), device=y.device), names, name)
        identities = as_labels(f"{name} index", index, len(pixels)).to(pixels.device)
        if len(identities.unique()) < len(identities):
            raise UnmovedError(f"{name} index: expected distinct identities, came some more than once")
        return ArraySplit(pixels, y, identities, names, name)

    def __repr__(self) -> str:
        return f"<ArraySplit {self.name}: {len(self)} images {self.shape}, {self.num_classes} classes>"

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of one image."""
        _, c, h, w = self.images.shape
        return c, h, w

    def __len__(self) -> int:
        return len(self.labels)

    def batches(self, size: int, *, shuffle: int | None = None) -> Iterator[Batch]:
        """Batches of at most ``size`` samples, images as float32 in [0, 1].

        The order is a function of the seed ``shuffle`` alone, the same on every device; without it, as stored.
        """
        size = require_whole("batch size", size, at_least=1)
        order = None if shuffle is None else torch.randperm(len(self), generator=seeded(shuffle))
        return self._batches(size, None if order is None else order.to(self.images.device))

    def _batches(self, size: int, order: Tensor | None) -> Iterator[Batch]:
        for start in range(0, len(self), size):
            chunk = slice(start, start + size)
            where = chunk if order is None else order[chunk]
            yield Batch(_as_floats(self.images[where]), self.labels[where], self.index[where])

    def take(self, n: int, seed: int | None = None) -> ArraySplit:
        """The first ``n`` samples, or ``n`` random ones; with one seed, fewer samples are a part of more."""
        n = require_whole(f"{self.name}: number of samples", n, at_least=1)
        if n > len(self):
            raise UnmovedError(f"{self.name}: expected at most its {len(self)} samples, came {n}; ask for fewer")
        return self.select(torch.arange(n) if seed is None else torch.randperm(len(self), generator=seeded(seed))[:n])

    def select(self, positions: Tensor) -> ArraySplit:
        """The samples at these positions (or where a mask is true); identities stay."""
        where = positions.to(self.images.device)
        return replace(self, images=self.images[where], labels=self.labels[where], index=self.index[where])

    def part(self, number: int, of: int, permutation: int = 0) -> ArraySplit:
        """Part ``number`` (0..of-1) of ``of`` disjoint parts of equal size, cut after a permutation by its number.

        What does not divide evenly is left out. Parts of one permutation share no sample; of two permutations they do.

        Raises:
            UnmovedError: a number outside 0..of-1, or fewer samples than parts.
        """
        of = require_whole(f"{self.name}: number of parts", of, at_least=1)
        number = require_whole(f"{self.name}: part", number, at_least=0, at_most=of - 1)
        if of > len(self):
            raise UnmovedError(f"{self.name}: expected at most {len(self)} parts, as many as samples, came {of}")
        size = len(self) // of
        order = torch.randperm(len(self), generator=seeded(permutation))
        return self.select(order[number * size : (number + 1) * size])

    def to(self, device: torch.device | str) -> ArraySplit:
        """The split on a device; no copy where it is there already."""
        moved = {name: getattr(self, name).to(device) for name in ("images", "labels", "index")}
        return replace(self, **moved)

    def hold_out(self, size: float, seed: int) -> tuple[ArraySplit, ArraySplit]:
        """(train, validation): ``size`` samples, a share in (0, 1) or a count, held out of each class alike.

        A class of n samples gives floor or ceil of n * count / N. Identities and order stay.

        Raises:
            UnmovedError: a size that leaves one side empty.
        """
        chosen = _stratified(self.labels.cpu(), held_out(f"{self.name}: held-out size", size, len(self)), seed)
        return self.select(~chosen), replace(self.select(chosen), name=f"{self.name}/validation")


def _as_floats(images: Tensor) -> Image:
    return images.float() / 255 if images.dtype == torch.uint8 else images.clone()


def _stratified(labels: Tensor, count: int, seed: int) -> Tensor:
    """A mask of ``count`` true values, spread over the classes by largest remainder."""
    total, sizes = len(labels), labels.bincount()
    quota, remainder = sizes * count // total, sizes * count % total
    quota[remainder.argsort(descending=True, stable=True)[: count - int(quota.sum())]] += 1
    shuffled = torch.randperm(total, generator=seeded(seed))
    by_class = shuffled[labels[shuffled].argsort(stable=True)]
    rank = torch.arange(total) - (sizes.cumsum(0) - sizes)[labels[by_class]]
    chosen = torch.zeros(total, dtype=torch.bool)
    chosen[by_class] = rank < quota[labels[by_class]]
    return chosen


@dataclass(frozen=True, eq=False)
class DataSet:
    """What a source gives: a training and a test split of the same classes and image shape.

    Attributes:
        train, test: the splits.
        name: the source, without the part.
        skipped: files left out because they could not be read, only where the user asked for that.

    Raises:
        UnmovedError: the two splits do not belong together.
    """

    train: ArraySplit
    test: ArraySplit
    name: str = "data"
    skipped: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.train.shape != self.test.shape or self.train.classes != self.test.classes:
            raise UnmovedError(
                f"{self.name}: expected the same image shape and classes in both parts, came train {self.train.shape} "
                f"with {self.train.num_classes} classes, test {self.test.shape} with {self.test.num_classes}"
            )

    @property
    def classes(self) -> tuple[str, ...]:
        return self.train.classes

    @staticmethod
    def of(train: ArraySplit, test: ArraySplit, name: str, skipped: tuple[str, ...] = ()) -> DataSet:
        """The two parts, renamed ``name/train`` and ``name/test``."""
        return DataSet(replace(train, name=f"{name}/train"), replace(test, name=f"{name}/test"), name, skipped)
