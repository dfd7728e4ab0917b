"""MNIST and whatever else comes as IDX files: magic number, sizes, then the bytes."""

from __future__ import annotations

import gzip
import math
import os
import struct
import zlib
from pathlib import Path
from typing import IO

import numpy as np

from unmoved.data.checks import require_path
from unmoved.data.splits import ArraySplit, DataSet
from unmoved.errors import UnmovedError
from unmoved.reading import most_unpacked, regular

UINT8 = 0x08
LARGEST = 4 * 2**30  # bytes; far above any published IDX file, far below a header of random bytes
DIGITS = tuple("0123456789")


def mnist(path: str | os.PathLike[str]) -> DataSet:
    """MNIST, or a data set packed like it, from a folder with its four IDX files, gzipped or not.

    Args:
        path: the folder, or the root that torchvision fills (``path/MNIST/raw``).

    Raises:
        UnmovedError: a missing or damaged file, or images and labels that do not match.
    """
    root = require_path("mnist.path", path)
    folders = [root, root / "MNIST" / "raw", root / "raw"]
    return DataSet.of(_split(folders, "train"), _split(folders, "t10k"), "mnist")


def _split(folders: list[Path], part: str) -> ArraySplit:
    images, labels = _find(folders, f"{part}-images", "idx3"), _find(folders, f"{part}-labels", "idx1")
    x, y = read_idx(images, 3), read_idx(labels, 1)
    if len(x) != len(y):
        raise UnmovedError(
            f"expected one label per image, came {len(x)} images in {images}, {len(y)} labels in {labels}"
        )
    return ArraySplit.of(x, y, classes=DIGITS, name=str(images))


def _find(folders: list[Path], what: str, kind: str) -> Path:
    names = [f"{what}{dot}{kind}-ubyte{suffix}" for suffix in ("", ".gz") for dot in ("-", ".")]
    for folder in folders:
        for name in names:
            if (folder / name).is_file():
                return folder / name
    raise UnmovedError(f"mnist.path: expected a file {names[0]} or {names[2]} in {folders[0]}, came none")


def read_idx(path: Path, dimensions: int) -> np.ndarray:
    """The uint8 array of an IDX file, gzipped or not.

    Magic: two zero bytes, 0x08 (unsigned byte), the number of dimensions; then each dimension as a big-endian uint32.

    Args:
        dimensions: 3 for images, 1 for labels.

    Raises:
        UnmovedError: another magic number, sizes that do not match the content, or a damaged gzip stream.
    """
    try:
        with regular(path) as raw:
            zipped = raw.read(2) == b"\x1f\x8b"
            raw.seek(0)
            if not zipped:
                return _parse(raw, path, dimensions, LARGEST)
            with gzip.GzipFile(fileobj=raw) as stream:
                return _parse(stream, path, dimensions, min(LARGEST, most_unpacked(path.stat().st_size)))
    except (OSError, EOFError, zlib.error) as error:
        raise UnmovedError(
            f"{path}: expected a readable IDX file, came {type(error).__name__}: {error}; copy or download it again"
        ) from error


def _parse(stream: IO[bytes] | gzip.GzipFile, path: Path, dimensions: int, most: int) -> np.ndarray:
    magic, expected = _read(stream, 4), bytes([0, 0, UINT8, dimensions])
    if magic != expected:
        raise UnmovedError(
            f"{path}: expected an IDX file of unsigned bytes with {dimensions} dimension(s), magic {expected.hex()}, "
            f"came {magic.hex() or 'nothing'}; is it the right file?"
        )
    header = _read(stream, 4 * dimensions)
    if len(header) < 4 * dimensions:
        raise UnmovedError(f"{path}: expected {dimensions} sizes after the magic number, came the end of the file")
    shape = struct.unpack(f">{dimensions}I", header)
    size = math.prod(shape)
    if not 0 < size <= most:
        raise UnmovedError(f"{path}: expected a size between 1 and {most} bytes, came the shape {shape}")
    content = _read(stream, size + 1)  # one more than announced, to see that nothing follows
    if len(content) != size:
        came = "more" if len(content) > size else f"{len(content)}"
        raise UnmovedError(
            f"{path}: expected {size} bytes for the shape {shape}, came {came}; copy or download it again"
        )
    return np.frombuffer(content, np.uint8).reshape(shape)


def _read(stream: IO[bytes] | gzip.GzipFile, size: int) -> bytearray:
    """At most ``size`` bytes, taken piece by piece: a header may announce more than the memory holds."""
    content = bytearray()
    while len(content) < size and (piece := stream.read(min(size - len(content), 2**20))):
        content += piece
    return content
