"""Load MNIST and other data in IDX files: magic number, sizes, then the bytes."""

from __future__ import annotations

import gzip
import math
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedIOBase
from pathlib import Path

import numpy as np
import torch

from unmoved.core.errors import UnmovedError
from unmoved.core.untrusted import damage_explained, most_unpacked, regular
from unmoved.data.dataset import DataSet, Unread
from unmoved.data.growing_array import PIECE
from unmoved.data.split import ArraySplit
from unmoved.data.validation import as_classes, as_labels, require_path

UINT8 = 0x08
LARGEST = 4 * 2**30  # bytes; far above any published IDX file, far below a header of random bytes
DIGITS = tuple("0123456789")


def mnist(path: str | os.PathLike[str], *, lazily: bool = False) -> DataSet:
    """Load MNIST, or a data set packed like it, from a folder with its four IDX files, gzipped or not.

    Args:
        path: the folder, or the root that torchvision fills (``path/MNIST/raw``).
        lazily: read the images of a part when they are asked for.

    Raises:
        UnmovedError: a missing or damaged file, or images and labels that do not match.
    """
    root = require_path("mnist.path", path)
    folders = [root, root / "MNIST" / "raw", root / "raw"]
    return DataSet.of(_unread(folders, "train"), _unread(folders, "t10k"), "mnist", lazily=lazily)


def _unread(folders: list[Path], part: str) -> Unread:
    images, labels = _find(folders, f"{part}-images", "idx3"), _find(folders, f"{part}-labels", "idx1")
    with _opened(images) as (stream, most):
        count, *sides = _shape(stream, images, 3, most)
    stored = read_idx(labels, 1)
    if len(stored) != count:
        raise UnmovedError(
            f"expected one label per image, came {count} images in {images}, {len(stored)} labels in {labels}"
        )
    y = as_labels(f"{labels} labels", stored, count)
    classes = as_classes(f"{labels} classes", DIGITS, int(y.max()))

    def load() -> ArraySplit:
        x = torch.from_numpy(read_idx(images, 3))[:, None]
        return ArraySplit(x, y, torch.arange(count), classes, str(images))

    return Unread(torch.arange(count), classes, (1, sides[0], sides[1]), load, str(images))


def _find(folders: list[Path], what: str, kind: str) -> Path:
    names = [f"{what}{dot}{kind}-ubyte{suffix}" for suffix in ("", ".gz") for dot in ("-", ".")]
    for folder in folders:
        for name in names:
            if (folder / name).is_file():
                return folder / name
    raise UnmovedError(f"mnist.path: expected a file {names[0]} or {names[2]} in {folders[0]}, came none")


def read_idx(path: Path, dimensions: int) -> np.ndarray:
    """Read the uint8 array of an IDX file, gzipped or not.

    Magic: two zero bytes, 0x08 (unsigned byte), the number of dimensions; then each dimension as a big-endian uint32.

    Args:
        dimensions: 3 for images, 1 for labels.

    Raises:
        UnmovedError: another magic number, sizes that do not match the content, or a damaged gzip stream.
    """
    with _opened(path) as (stream, most):
        shape = _shape(stream, path, dimensions, most)
        values = np.empty(shape, np.uint8)  # memory is taken as it is filled, however much a header announces
        room, filled = values.reshape(-1).data, 0
        while came := stream.readinto(room[filled : filled + PIECE]):
            filled += came
        if filled < len(room) or stream.read(1):
            words = f"{filled}" if filled < len(room) else "more"
            raise UnmovedError(
                f"{path}: expected {len(room)} bytes for the shape {shape}, came {words}; copy or download it again"
            )
        return values


@contextmanager
def _opened(path: Path) -> Iterator[tuple[BufferedIOBase, int]]:
    """Open the file, unpacked if it is gzipped, and return how many bytes it may announce."""
    with damage_explained(path, "IDX file"), regular(path) as raw:
        zipped = raw.read(2) == b"\x1f\x8b"
        raw.seek(0)
        if not zipped:
            yield raw, LARGEST
        else:
            with gzip.GzipFile(fileobj=raw) as stream:
                yield stream, min(LARGEST, most_unpacked(path.stat().st_size))


def _shape(stream: BufferedIOBase, path: Path, dimensions: int, most: int) -> tuple[int, ...]:
    magic, expected = stream.read(4), bytes([0, 0, UINT8, dimensions])
    if magic != expected:
        raise UnmovedError(
            f"{path}: expected an IDX file of unsigned bytes with {dimensions} dimension(s), magic {expected.hex()}, "
            f"came {magic.hex() or 'nothing'}; is it the right file?"
        )
    header = stream.read(4 * dimensions)
    if len(header) < 4 * dimensions:
        raise UnmovedError(f"{path}: expected {dimensions} sizes after the magic number, came the end of the file")
    shape = struct.unpack(f">{dimensions}I", header)
    if not 0 < math.prod(shape) <= most:
        raise UnmovedError(f"{path}: expected a size between 1 and {most} bytes, came the shape {shape}")
    return shape
