"""A user's own images: one folder (or tar archive) with a sub-folder per class."""

from __future__ import annotations

import os

import numpy as np
import PIL
import torch

from unmoved.data import archive
from unmoved.data.cache import Decoded, Slot
from unmoved.data.checks import require_flag, require_path
from unmoved.data.decode import Pixels
from unmoved.data.decode_all import Progress, decode_all
from unmoved.data.splits import ArraySplit, DataSet
from unmoved.data.trees import Tree, tree
from unmoved.errors import UnmovedError
from unmoved.reading import readable


def folder(
    path: str | os.PathLike[str],
    *,
    size: int | tuple[int, int] | None = None,
    grey: bool = False,
    skip_corrupt: bool = False,
    cache: bool | str | os.PathLike[str] = True,
    test: float = 0.2,
    seed: int = 0,
    progress: Progress | None = None,
) -> DataSet:
    """Images in one sub-folder per class, ``path/train/<class>`` and ``path/test/<class>``, or ``path/<class>``.

    Classes and files are taken in the order of their names. Hidden files and files beside the class folders are left
    alone; every other file must be an image that Pillow reads (EPS, which runs a program, is refused). Images are
    turned upright as their EXIF data says, transparency is dropped.

    Args:
        path: a folder, or a tar archive (.tar, .tar.gz, .tar.xz, .tar.bz2) of one; nothing is extracted.
        size: side or (height, width) to resize to (bilinear, antialiased, the aspect ratio is not kept); needed
            where the images differ in size.
        grey: one channel in place of three.
        skip_corrupt: leave unreadable images out; `DataSet.skipped` names them.
        cache: keep the decoded images (in the user's cache folder, or in the folder given), and use them as long as
            names, sizes, times and settings stay the same.
        test, seed: share or number of held-out samples and the seed of that choice, where there is no train/ and test/.
        progress: called with (done, total) while images are decoded.

    Raises:
        UnmovedError: no such folder, an empty class, fewer than two classes, a corrupt image, different sizes.
    """
    root, pixels = require_path("folder.path", path), Pixels.of(size, grey)
    require_flag("folder.skip_corrupt", skip_corrupt)
    source = tree(root)
    slot = Slot.of(cache, root, repr((pixels, skip_corrupt, PIL.__version__)), source)
    decoded = slot.load() if slot else None
    if decoded is None:
        decoded = _decoded(source, pixels, skip_corrupt, progress)
        if slot:
            slot.save(decoded)
    return _data_set(decoded, archive.stem(root.absolute()), test, seed)


def _decoded(source: Tree, pixels: Pixels, skip_corrupt: bool, progress: Progress | None) -> Decoded:
    with source.listed() as (layout, items):
        images, kept, skipped = decode_all(
            items, len(layout.files), pixels, skip_corrupt=skip_corrupt, progress=progress
        )
    labels, train = np.array(layout.labels)[kept], int((kept < layout.train).sum())
    for part in (labels[:train], labels[train:])[: 1 if layout.train == len(layout.files) else 2]:
        lost = np.bincount(part, minlength=len(layout.classes)) == 0
        if lost.any():
            name = layout.classes[int(lost.argmax())]
            raise UnmovedError(
                f"expected a readable image in every class, came only corrupt ones in {name!r}: {skipped[0]}"
            )
    return Decoded(images, labels, train, layout.classes, tuple(skipped))


def _data_set(decoded: Decoded, name: str, test: float, seed: int) -> DataSet:
    images, labels = torch.from_numpy(decoded.images), torch.from_numpy(decoded.labels)
    classes = tuple(map(readable, decoded.classes))

    def part(x: torch.Tensor, y: torch.Tensor) -> ArraySplit:
        return ArraySplit(x, y, torch.arange(len(y)), classes, name)

    cut = decoded.train
    whole = cut == len(labels)
    train, held = (
        part(images, labels).hold_out(test, seed)
        if whole
        else (part(images[:cut], labels[:cut]), part(images[cut:], labels[cut:]))
    )
    return DataSet.of(train, held, name, decoded.skipped)
