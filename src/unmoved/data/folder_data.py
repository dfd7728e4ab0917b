"""Load a user's own images from a folder (or tar archive) with a sub-folder per class."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from typing import Literal

import numpy as np
import PIL
import torch

from unmoved.core.errors import UnmovedError, require_flag
from unmoved.core.untrusted import readable
from unmoved.data import tar_archive
from unmoved.data.dataset import DataSet, Unread
from unmoved.data.decode import Pixels
from unmoved.data.decode_all import Progress, decode_all
from unmoved.data.decoded_cache import Decoded, Slot
from unmoved.data.folder_sources import Folder, Tar, tree
from unmoved.data.growing_array import PIECE, Filling, require_light
from unmoved.data.split import ArraySplit, drawn_for_test, require_parts_are_meant
from unmoved.data.validation import require_path


def folder(
    path: str | os.PathLike[str],
    *,
    size: int | tuple[int, int] | None = None,
    grey: bool = False,
    skip_corrupt: bool = False,
    cache: bool | str | os.PathLike[str] = True,
    test: float | Literal["all"] = 0.2,
    seed: int = 0,
    progress: Progress | None = None,
    lazily: bool = False,
) -> DataSet:
    """Load images from sub-folders, ``path/train/<class>`` and ``path/test/<class>``, or ``path/<class>``.

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
        test, seed: share or number of held-out samples and the seed of that choice, where there is no train/ and test/;
            ``"all"`` of them, for a model that is judged only.
        progress: called with (done, total) while images are decoded.
        lazily: leave decoded images in the cache until a part is asked for.

    Raises:
        UnmovedError: no such folder, an empty class, fewer than two classes, a corrupt image, different sizes.
    """
    root, pixels = require_path("folder.path", path), Pixels.of(size, grey)
    skip_corrupt = require_flag("folder.skip_corrupt", skip_corrupt)
    source = tree(root)
    slot = Slot.of(cache, root, repr((pixels, skip_corrupt, PIL.__version__)), source.stamps())
    name = tar_archive.stem(root.absolute())

    def decode() -> Decoded:
        made = _decoded(source, pixels, skip_corrupt, progress)
        if slot:
            slot.save(made)
        return made

    decoded = slot.load() if slot else None
    if decoded is None:
        decoded = decode()
        decoded = (slot.load() if slot and lazily else None) or decoded
    data = _data_set(decoded, name, test, seed, decode)
    return data if lazily else data.read()


def _decoded(source: Folder | Tar, pixels: Pixels, skip_corrupt: bool, progress: Progress | None) -> Decoded:
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


def _data_set(
    decoded: Decoded, name: str, test: float | Literal["all"], seed: int, decode: Callable[[], Decoded]
) -> DataSet:
    """Make the two parts; if the cache turns out to be damaged, images are decoded anew."""
    labels, classes = torch.from_numpy(decoded.labels), tuple(map(readable, decoded.classes))
    if parted := decoded.train < len(labels):
        require_parts_are_meant(name, test)
        chosen = torch.arange(len(labels)) >= decoded.train
    else:
        chosen = drawn_for_test(name, labels, test, seed)
    masks = {"train": ~chosen, "test": chosen}
    # In a folder with parts each part numbers its own images.
    index = {part: torch.arange(int(m.sum())) if parted else m.nonzero().flatten() for part, m in masks.items()}
    images = decoded.images
    if isinstance(images, np.ndarray):
        require_light(f"{name} images", int(images.max()))
        _put_last(images, chosen.numpy())
        halves = dict(zip(masks, torch.from_numpy(images).split([len(i) for i in index.values()]), strict=True))
        train, held = (
            ArraySplit(halves[part], labels[mask], index[part], classes, name) for part, mask in masks.items()
        )
        return DataSet.of(train, held, name, decoded.skipped)

    def load(part: str) -> ArraySplit:
        try:
            room = Filling(f"{name} images", images.shape, count=len(index[part]), layout="NCHW")
            x = images.picked(masks[part], room)
        except UnmovedError:  # a damaged cache: decode again
            anew: ArraySplit = getattr(_data_set(decode(), name, test, seed, decode), part)
            return anew
        return ArraySplit(x, labels[masks[part]], index[part], classes, name)

    _, c, h, w = images.shape
    first, last = (Unread(index[part], classes, (c, h, w), partial(load, part), name) for part in masks)
    return DataSet.of(first, last, name, decoded.skipped)


def _put_last(images: np.ndarray, chosen: np.ndarray) -> None:
    """Move the chosen images behind the others, in place, since the array may fill half of the memory."""
    behind, stay = images[chosen], np.flatnonzero(~chosen)
    step = max(1, PIECE // images[:1].nbytes)
    for start in range(0, len(stay), step):  # each moves to a position that has been read already, or stays
        images[start : start + step][: len(stay) - start] = images[stay[start : start + step]]
    images[len(stay) :] = behind
