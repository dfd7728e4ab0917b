"""Check images, labels, paths and shares that a user hands in."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from unmoved.core.errors import UnmovedError, require_number, require_seed, require_whole
from unmoved.core.preconditions import require_labels
from unmoved.core.untrusted import readable
from unmoved.data.growing_array import Array, Filling, as_own, pieces

MOST_CLASSES = 1_000_000  # a larger label is no label, and its names alone would fill the memory
LARGEST = 512 * 2**20  # bytes of one image or batch; a file that claims more is an attack on the memory


def require_path(name: str, path: str | os.PathLike[str]) -> Path:
    """Return the path with ``~`` expanded.

    Raises:
        UnmovedError: it is no path, or nothing is there.
    """
    if not isinstance(path, str | os.PathLike):
        raise UnmovedError(f"{name}: expected the path of a file or folder, came {path!r}")
    found = Path(path).expanduser()
    try:
        there = found.exists()
    except (OSError, ValueError) as error:
        raise UnmovedError(f"{name}: cannot look at {str(found)!r}: {error}") from error
    if not there:
        raise UnmovedError(f"{name}: expected an existing file or folder, came {str(found)!r}; correct the path")
    return found


def require_file(name: str, path: Path) -> None:
    """Raise `UnmovedError` unless a regular file is there: a pipe or a device may never end."""
    if not path.is_file():
        raise UnmovedError(f"{name}: expected a regular file, came {str(path)!r}; correct the path")


def held_out(name: str, size: float, total: int) -> int:
    """Return how many of ``total`` samples a share in (0, 1) or a count in 1..total-1 means.

    Raises:
        UnmovedError: neither, or one side would be empty.
    """
    advice = "expected is a share such as 0.1 or a count such as 1000"
    size = require_number(name, size, advice=advice)
    if size == 1 and isinstance(size, float):  # all of the samples, or one of them?
        raise UnmovedError(f"{name}: came {size!r}; {advice}")
    count = round(size * total) if 0 < size < 1 else require_whole(name, size, advice=advice)
    if not 0 < count < total:
        raise UnmovedError(
            f"{name}: expected at least one sample on each side, came {size!r}, which is {count} of {total} samples"
        )
    return count


def seeded(seed: int) -> torch.Generator:
    """Make a CPU generator, so that the caller's random state stays and all devices see the same order."""
    return torch.Generator().manual_seed(require_seed("seed", seed))


def as_tensor(what: str, values: Array) -> Tensor:
    """Copy a tensor or a numeric numpy array to a tensor."""
    _require_array(what, values)
    owned = as_own(values)
    return owned.clone(memory_format=torch.contiguous_format) if isinstance(values, Tensor) else owned


def as_images(what: str, values: Array, layout: str | None = None) -> Tensor:
    """Copy images to (N, C, H, W), uint8 if the pixels are k/255, otherwise float32 in [0, 1].

    Args:
        what: how messages name these images.
        values: uint8 or float in [0, 1], of shape (N, H, W), (N, C, H, W) or (N, H, W, C).
        layout: ``"NCHW"`` or ``"NHWC"``, needed where the shape alone does not tell.
    """
    _require_array(what, values)
    room = Filling(what, values.shape, layout=layout, device=values.device if isinstance(values, Tensor) else "cpu")
    for piece in pieces(values):
        room.put(piece)
    return room.images


def _require_array(what: str, values: object) -> None:
    if isinstance(values, Tensor):
        return
    if not isinstance(values, np.ndarray):
        raise UnmovedError(f"{what}: expected a torch tensor or a numpy array, came a {type(values).__name__}")
    if values.dtype.kind not in "uif" or values.dtype.itemsize > 8:
        raise UnmovedError(f"{what}: expected numbers, came a numpy array of {values.dtype}")


def as_labels(what: str, values: Array, count: int) -> Tensor:
    """Convert labels to (N,) int64, none negative, as many as there are images."""
    if isinstance(values, np.ndarray) and values.dtype.kind in "US":
        raise UnmovedError(
            f"{what}: expected whole numbers 0..K-1, came texts; numpy.unique(labels, return_inverse=True) gives the "
            "names of the classes and the numbers"
        )
    labels = as_tensor(what, values)
    if labels.ndim != 1:
        raise UnmovedError(
            f"{what}: expected shape ({count},), came {tuple(labels.shape)}; "
            "use labels.argmax(1) on one-hot labels, labels.squeeze() on a column"
        )
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        nan = " with NaN" if labels.is_floating_point() and labels.isnan().any() else ""
        raise UnmovedError(
            f"{what}: expected whole numbers 0..K-1 of an integer type, came {labels.dtype}{nan}; "
            "convert with labels.astype('int64') once they are whole"
        )
    if len(labels) != count:
        raise UnmovedError(f"{what}: expected one label per image, came {len(labels)} labels for {count} images")
    labels = labels.long()
    require_labels(labels, where=what)
    return labels


def numbered(what: str, largest: int) -> tuple[str, ...]:
    """Return the class names ``"0"`` .. ``"largest"``."""
    if largest >= MOST_CLASSES:
        raise UnmovedError(f"{what}: expected labels below {MOST_CLASSES}, came {largest}; number the classes from 0")
    return tuple(str(k) for k in range(largest + 1))


def as_classes(what: str, classes: Sequence[str] | None, largest: int) -> tuple[str, ...]:
    """Return at least two distinct class names that cover the labels; ``"0"``, ``"1"``, ... unless given."""
    if isinstance(classes, str):
        raise UnmovedError(f"{what}: expected a sequence of class names, came the single text {classes!r}")
    names = numbered(what, largest) if classes is None else tuple(readable(str(name)) for name in classes)
    if len(names) < 2 or len(set(names)) < len(names):
        raise UnmovedError(f"{what}: expected at least two classes with distinct names, came {names[:10]}")
    if largest >= len(names):
        raise UnmovedError(f"{what}: expected labels 0..{len(names) - 1} for {len(names)} classes, came {largest}")
    return names
