"""Hold images and labels in memory (or on a device) as one tensor each, and draw batches from them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from unmoved.core.batch import Batch, Image, Index, Label
from unmoved.core.errors import UnmovedError, require_whole
from unmoved.data.growing_array import Array
from unmoved.data.validation import as_classes, as_images, as_labels, held_out, seeded

MOVED = 4096  # images that are copied at a time


@dataclass(frozen=True, eq=False, repr=False)
class ArraySplit:
    """Hold a part of a data set as tensors; `of` makes one from a user's arrays and checks every value.

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
        images: Array,
        labels: Array,
        *,
        classes: Sequence[str] | None = None,
        index: Array | None = None,
        name: str = "data",
        layout: str | None = None,
    ) -> ArraySplit:
        """Make a split of a copy of numpy arrays or tensors.

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
        """Return (C, H, W) of one image."""
        _, c, h, w = self.images.shape
        return c, h, w

    def __len__(self) -> int:
        return len(self.labels)

    @cached_property
    def digest(self) -> str:
        """Compute the sha256 of images, labels, identities and classes, by which other data is known."""
        return _digest(self, self.images.split(MOVED))

    def batches(self, size: int, *, shuffle: int | None = None) -> Iterator[Batch]:
        """Iterate over batches of at most ``size`` samples, images as float32 in [0, 1].

        The order is a function of the seed ``shuffle`` alone, the same on every device; without it, as stored.
        """
        size = require_whole("batch size", size, at_least=1)
        order = None if shuffle is None else torch.randperm(len(self), generator=seeded(shuffle))
        return self.gathered(None if order is None else order.to(self.images.device), size)

    def gathered(self, rows: Tensor | None, size: int) -> Iterator[Batch]:
        """Iterate over batches of the samples at these positions, in their order; without positions, of all."""
        for start in range(0, len(self) if rows is None else len(rows), size):
            chunk = slice(start, start + size)
            where = chunk if rows is None else rows[chunk]
            yield Batch(_as_floats(self.images[where]), self.labels[where], self.index[where])

    def take(self, n: int, seed: int | None = None) -> ArraySplit:
        """Return the first ``n`` samples, or ``n`` random ones; with one seed, fewer samples are a part of more."""
        return self.select(drawn(self, n, seed))

    def select(self, positions: Tensor) -> ArraySplit:
        """Select samples by positions or by a mask; identities stay."""
        where = positions.to(self.images.device)
        return replace(self, images=self.images[where], labels=self.labels[where], index=self.index[where])

    def part(self, number: int, of: int, permutation: int = 0) -> ArraySplit:
        """Return part ``number`` (0..of-1) of ``of`` disjoint parts of equal size, after a permutation by its number.

        What does not divide evenly is left out. Parts of one permutation share no sample; of two permutations they do.

        Raises:
            UnmovedError: a number outside 0..of-1, or fewer samples than parts.
        """
        of = require_whole(f"{self.name}: number of parts", of, at_least=1)
        number = require_whole(f"{self.name}: part", number, at_least=0, at_most=of - 1)
        if of > len(self):
            raise UnmovedError(f"{self.name}: expected at most {len(self)} parts, as many as samples, came {of}")
        return self.select(positions_of_part(len(self), number, of, permutation))

    def to(self, device: torch.device | str) -> ArraySplit:
        """Move the split to a device; no copy if it is there already."""
        moved = {name: getattr(self, name).to(device) for name in ("images", "labels", "index")}
        return replace(self, **moved)

    def hold_out(self, size: float, seed: int) -> tuple[ArraySplit, ArraySplit]:
        """Divide into (train, validation): ``size`` samples, a share or a count, held out of each class alike.

        A class of n samples gives floor or ceil of n * count / N. Identities and order stay.

        Raises:
            UnmovedError: a size that leaves one side empty.
        """
        chosen = self.held_out(size, seed)
        return self.select(~chosen), replace(self.select(chosen), name=f"{self.name}/validation")

    def held_out(self, size: float, seed: int) -> Tensor:
        """Return a mask (N,) of the samples that `hold_out` holds out."""
        return stratified(self.labels.cpu(), held_out(f"{self.name}: held-out size", size, len(self)), seed)

    def lent(self, positions: Tensor, name: str | None = None) -> Selection:
        """Select as `select` does, without a copy of the images: they stay in this split's memory."""
        where = positions.to(self.images.device)
        rows = where.nonzero().flatten() if where.dtype == torch.bool else where
        return Selection(self, rows, self.name if name is None else name)


@dataclass(frozen=True, eq=False, repr=False)
class Selection:
    """Refer to some samples of a split whose images stay in its memory: each batch is gathered from there.

    Attributes:
        whole: the split they are of.
        rows: (N,) int64, their positions in it.
        name: how tables and messages call it.
    """

    whole: ArraySplit
    rows: Tensor
    name: str

    def __repr__(self) -> str:
        return f"<Selection {self.name}: {len(self)} images {self.shape}, {self.num_classes} classes>"

    def __len__(self) -> int:
        return len(self.rows)

    classes = property(lambda self: self.whole.classes)
    num_classes = property(lambda self: self.whole.num_classes)
    shape = property(lambda self: self.whole.shape)
    labels = property(lambda self: self.whole.labels[self.rows])
    index = property(lambda self: self.whole.index[self.rows])
    images = property(lambda self: self.whole.images[self.rows], doc="(N, C, H, W), a copy, as `ArraySplit.images`.")

    @cached_property
    def digest(self) -> str:
        """Compute the digest as `ArraySplit.digest` does: it is the same as that of a copy."""
        return _digest(self, (self.whole.images[rows] for rows in self.rows.split(MOVED)))

    def batches(self, size: int, *, shuffle: int | None = None) -> Iterator[Batch]:
        """Iterate over batches as `ArraySplit.batches` does."""
        size = require_whole("batch size", size, at_least=1)
        order = None if shuffle is None else torch.randperm(len(self), generator=seeded(shuffle))
        rows = self.rows if order is None else self.rows[order.to(self.rows.device)]
        return self.whole.gathered(rows, size)

    def select(self, positions: Tensor) -> ArraySplit:
        """Select samples by positions or by a mask, with a copy of their images."""
        return replace(self.whole.select(self.rows[positions.to(self.rows.device)]), name=self.name)

    def take(self, n: int, seed: int | None = None) -> ArraySplit:
        """Return samples as `ArraySplit.take` does."""
        return self.select(drawn(self, n, seed))

    def to(self, device: torch.device | str) -> Selection | ArraySplit:
        """Move these samples, and no others, to a device; no copy if they are there already."""
        if torch.empty(0, device=device).device == self.rows.device:
            return self
        images = torch.empty((len(self), *self.shape), dtype=self.whole.images.dtype, device=device)
        for start, rows in zip(range(0, len(self), MOVED), self.rows.split(MOVED), strict=True):
            images[start : start + MOVED] = self.whole.images[rows].to(device)
        return ArraySplit(images, self.labels.to(device), self.index.to(device), self.classes, self.name)


def drawn(split: ArraySplit | Selection, n: int, seed: int | None = None) -> Tensor:
    """Return the positions (n,) of the first samples of a split, or of random ones."""
    n = require_whole(f"{split.name}: number of samples", n, at_least=1)
    if n > len(split):
        raise UnmovedError(f"{split.name}: expected at most its {len(split)} samples, came {n}; ask for fewer")
    return torch.arange(n) if seed is None else torch.randperm(len(split), generator=seeded(seed))[:n]


def positions_of_part(total: int, number: int, of: int, permutation: int) -> Tensor:
    """Return the positions of the samples of `ArraySplit.part`, in a split of ``total``."""
    size, order = total // of, torch.randperm(total, generator=seeded(permutation))
    return order[number * size : (number + 1) * size]


def _digest(split: ArraySplit | Selection, images: Iterable[Tensor]) -> str:
    digest = hashlib.sha256(repr((len(split), split.shape, split.classes)).encode())
    for tensor in (*images, split.labels, split.index):
        digest.update(str(tensor.dtype).encode())
        digest.update(tensor.cpu().contiguous().numpy().data)
    return digest.hexdigest()


def _as_floats(images: Tensor) -> Image:
    return images.float() / 255 if images.dtype == torch.uint8 else images.clone()


def drawn_for_test(name: str, labels: Tensor, test: float | Literal["all"], seed: int) -> Tensor:
    """Draw a mask of a source's test samples, a share or a number of them or all, spread over the classes.

    Raises:
        UnmovedError: a share or a number that leaves one side empty.
    """
    if test == "all":
        return torch.ones(len(labels), dtype=torch.bool)
    return stratified(labels, held_out(f"{name}: held-out size", test, len(labels)), seed)


def require_parts_are_meant(name: str, test: object) -> None:
    """Raise `UnmovedError` where a source has training samples and all are to be test samples."""
    if test == "all":
        raise UnmovedError(f"{name}: expected no parts with test='all', came training and test data; leave test out")


def stratified(labels: Tensor, count: int, seed: int) -> Tensor:
    """Draw a mask of ``count`` true values, spread over the classes by largest remainder."""
    total, sizes = len(labels), labels.bincount()
    quota, remainder = sizes * count // total, sizes * count % total
    quota[remainder.argsort(descending=True, stable=True)[: count - int(quota.sum())]] += 1
    shuffled = torch.randperm(total, generator=seeded(seed))
    by_class = shuffled[labels[shuffled].argsort(stable=True)]
    rank = torch.arange(total) - (sizes.cumsum(0) - sizes)[labels[by_class]]
    chosen = torch.zeros(total, dtype=torch.bool)
    chosen[by_class] = rank < quota[labels[by_class]]
    return chosen
