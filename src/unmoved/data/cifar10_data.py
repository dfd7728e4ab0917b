"""Load CIFAR-10 from either form its authors publish: binary records, or pickled batches read without running code."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path, PurePosixPath

import numpy as np
import torch

from unmoved.core.errors import UnmovedError
from unmoved.core.untrusted import content
from unmoved.data.cifar10_pickle import StoredArray, loads
from unmoved.data.dataset import DataSet, Unread
from unmoved.data.split import ArraySplit
from unmoved.data.tar_archive import is_archive, opened
from unmoved.data.validation import require_path

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
SHAPE, PIXELS = (3, 32, 32), 3 * 32 * 32
RECORDS = 10_000  # in each file of both forms; fewer means a damaged file
MOST_BYTES = 2**20 + 4 * RECORDS * (
    1 + PIXELS
)  # no form takes more bytes per pixel; a larger claim would only exhaust the memory
TRAIN, TEST = tuple(f"data_batch_{k}" for k in range(1, 6)), ("test_batch",)
INSIDE = ("cifar-10-batches-bin", "cifar-10-batches-py", "cifar-10-binary.tar.gz", "cifar-10-python.tar.gz")

Read = Callable[[tuple[str, ...]], Iterator[tuple[str, bytes]]]  # names of files -> each with its bytes, in any order


def cifar10(path: str | os.PathLike[str], *, lazily: bool = False) -> DataSet:
    """Load CIFAR-10 from the official binary or Python version.

    Args:
        path: the unpacked folder, the .tar.gz, or a folder that holds one of them under its official name.
        lazily: read a part when it is asked for.

    Raises:
        UnmovedError: missing, damaged or hostile files; no code inside a pickle is ever run.
    """
    root = require_path("cifar10.path", path)
    if root.is_dir():
        for inside in (root, *(root / name for name in INSIDE)):
            if inside.is_dir() and (names := _batches([file.name for file in inside.iterdir() if file.is_file()])):
                return _data_set(names, partial(_from_folder, inside), str(inside), lazily)
            if inside.is_file():
                return cifar10(inside, lazily=lazily)
    elif is_archive(root):
        with opened(root) as archive:
            full = {PurePosixPath(name).name: name for name in archive.files}
            if names := _batches(list(full)):
                for name in names:
                    _require_size(archive.files[full[name]], f"{root}: {name}")
                return _data_set(names, partial(_from_archive, root), str(root), lazily)
    raise UnmovedError(
        f"cifar10.path: expected data_batch_1 .. data_batch_5 and test_batch (or the same with .bin) in {root}, "
        "came none of them; give the unpacked folder or the .tar.gz of the official binary or Python version"
    )


def _data_set(names: tuple[str, ...], read: Read, where: str, lazily: bool) -> DataSet:
    train, test = (
        Unread(torch.arange(RECORDS * len(files)), CLASSES, SHAPE, partial(_load, files, read, where), where)
        for files in (names[: len(TRAIN)], names[len(TRAIN) :])
    )
    return DataSet.of(train, test, "cifar10", lazily=lazily)


def _load(names: tuple[str, ...], read: Read, where: str) -> ArraySplit:
    """Load the images of these files, each decoded into its place as soon as it is read."""
    images, labels = np.empty((RECORDS * len(names), *SHAPE), np.uint8), np.empty(RECORDS * len(names), np.int64)
    for name, data in read(names):
        pixels, y = (_binary if name.endswith(".bin") else _pickled)(data, f"{where}: {name}")
        place = slice(RECORDS * names.index(name), RECORDS * (names.index(name) + 1))
        images[place], labels[place] = pixels, y
    x, labelled = torch.from_numpy(images), torch.from_numpy(labels)
    return ArraySplit(x, labelled, torch.arange(len(labels)), CLASSES, where)


def _from_folder(folder: Path, names: tuple[str, ...]) -> Iterator[tuple[str, bytes]]:
    yield from ((name, _bytes(folder / name)) for name in names)


def _from_archive(path: Path, names: tuple[str, ...]) -> Iterator[tuple[str, bytes]]:
    with opened(path) as archive:
        for full in archive.files:  # in the order of the archive: gzip cannot jump back
            if PurePosixPath(full).name in names:
                yield PurePosixPath(full).name, archive.read(full)


def _batches(there: list[str]) -> tuple[str, ...]:
    """Return the names of the six batch files of the form that is present, training first."""
    for suffix in (".bin", ""):
        names = tuple(name + suffix for name in TRAIN + TEST)
        missing = [name for name in names if name not in there]
        if missing and len(missing) < len(names):
            raise UnmovedError(f"cifar10.path: expected six batch files, came all but {', '.join(missing)}")
        if not missing:
            return names
    return ()


def _bytes(path: Path) -> bytes:
    try:
        return content(path, MOST_BYTES)
    except FileNotFoundError as error:
        raise UnmovedError(f"{path}: expected a readable file, came {error}") from error


def _require_size(size: int, name: str) -> None:
    """Raise `UnmovedError` where a batch claims more than any form of one takes."""
    if size > MOST_BYTES:
        raise UnmovedError(
            f"{name}: expected at most {MOST_BYTES} bytes, came {size}; download the official file again"
        )


def _binary(data: bytes, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Decode records of one label byte and 3072 pixels: red, green, blue planes."""
    if len(data) != RECORDS * (1 + PIXELS):
        raise UnmovedError(
            f"{name}: expected {RECORDS * (1 + PIXELS)} bytes ({RECORDS} records of {1 + PIXELS}), came {len(data)}; "
            "download it again"
        )
    records = np.frombuffer(data, np.uint8).reshape(RECORDS, 1 + PIXELS)
    return _checked(records[:, 1:], records[:, 0].astype(np.int64), name)


def _pickled(data: bytes, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Decode a pickled dictionary with ``data`` (10000, 3072) uint8 and ``labels``, a list of numbers."""
    content = loads(data, name)
    items = content.items() if isinstance(content, dict) else ()
    fields = {k.decode("latin1") if isinstance(k, bytes) else k: v for k, v in items if isinstance(k, str | bytes)}
    pixels, labels = fields.get("data"), fields.get("labels")
    if not isinstance(pixels, StoredArray) or not isinstance(labels, list):
        raise UnmovedError(
            f"{name}: expected a dictionary with an array 'data' and a list 'labels', came "
            + (f"the keys {sorted(fields)[:10]}" if fields else f"a {type(content).__name__}")
        )
    if not all(type(label) is int and 0 <= label < len(CLASSES) for label in labels):
        raise UnmovedError(f"{name}: expected labels 0..9, came something else")
    images = pixels.as_bytes(name)
    if images.shape != (RECORDS, PIXELS):
        raise UnmovedError(f"{name}: expected images ({RECORDS}, {PIXELS}), came {images.shape}; download it again")
    return _checked(images, np.array(labels, dtype=np.int64), name)


def _checked(images: np.ndarray, labels: np.ndarray, name: str) -> tuple[np.ndarray, np.ndarray]:
    largest = labels.max(initial=0)
    if len(labels) != len(images) or largest >= len(CLASSES):
        raise UnmovedError(f"{name}: expected {len(images)} labels 0..9, came {len(labels)}, largest {largest}")
    return images.reshape(-1, *SHAPE), labels
