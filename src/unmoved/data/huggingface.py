"""Load data sets of the Hugging Face hub, or local ones, through the ``datasets`` library (an extra)."""

from __future__ import annotations

import importlib
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from unmoved.core.errors import UnmovedError
from unmoved.data.dataset import DataSet, Unread
from unmoved.data.decode import Pixels, pillow_warnings
from unmoved.data.split import ArraySplit
from unmoved.data.validation import as_classes, as_labels, numbered


def hf(
    name: str,
    *,
    image: str | None = None,
    label: str = "label",
    train: str = "train",
    test: str = "test",
    size: int | tuple[int, int] | None = None,
    grey: bool = False,
    lazily: bool = False,
) -> DataSet:
    """Images and labels of two splits of ``datasets.load_dataset(name)``.

    Args:
        image: the column of images; the only one that holds images unless given.
        label: the column of labels: class labels, whole numbers 0..K-1, or texts (classes in alphabetical order).
        train, test: names of the two splits.
        size, grey: as in `folder`.
        lazily: decode the images of a part when they are asked for.

    Raises:
        UnmovedError: the library, the data set, a split or a column is missing; images of different sizes.
    """
    pixels = Pixels.of(size, grey)
    if train == test:
        raise UnmovedError(f"hf: expected two different splits for train and test, came {train!r} for both")
    try:
        library = importlib.import_module("datasets")
    except ImportError as error:
        raise UnmovedError(
            f"hf: expected the library 'datasets', came {error}; install it with: pip install 'unmoved[hf]'"
        ) from error
    tables = {part: _table(library, name, part) for part in (train, test)}
    images = {part: _Images(table, image, pixels, f"{name}/{part}") for part, table in tables.items()}
    labels, classes = _labels(
        {part: _column(table, label, name) for part, table in tables.items()}, label, tables[train]
    )
    parts = []
    for part, values in labels.items():
        y = as_labels(f"{name}/{part} labels", values, len(tables[part]))
        known = as_classes(f"{name}/{part} classes", classes, int(y.max()))
        parts.append(Unread(torch.arange(len(y)), known, images[part].shape, partial(_load, images[part], y, known)))
    found = DataSet.of(parts[0], parts[1], name)
    return found if lazily else found.read()


def _load(images: _Images, y: Tensor, classes: tuple[str, ...]) -> ArraySplit:
    return ArraySplit(torch.from_numpy(images.decoded()), y, torch.arange(len(y)), classes, images.where)


def _table(library: Any, name: str, part: str) -> Any:
    try:
        return library.load_dataset(name, split=part)
    except Exception as error:  # network, hub, parquet and builder errors have no common ancestor
        raise UnmovedError(
            f"hf: expected the split {part!r} of the data set {name!r}, came {type(error).__name__}: {error}; "
            "correct the name, or say which splits to use with train and test"
        ) from error


def _column(table: Any, column: str, name: str) -> list[Any]:
    if column not in table.column_names:
        raise UnmovedError(f"hf: expected a column {column!r} in {name}, came {', '.join(table.column_names)}")
    return list(table[column])


class _Images:
    """Read a column of images; one of them is decoded to see what they are."""

    def __init__(self, table: Any, column: str | None, pixels: Pixels, where: str) -> None:
        if not len(table):
            raise UnmovedError(f"hf: expected images in {where}, came an empty split")
        if column is None:
            found = [key for key, value in table[0].items() if isinstance(value, Image.Image)]
            if len(found) != 1:
                raise UnmovedError(
                    f"hf: expected one column of images in {where}, came {found or 'none'}; say image = ..."
                )
            column = found[0]
        if column not in table.column_names:
            raise UnmovedError(f"hf: expected a column {column!r} in {where}, came {', '.join(table.column_names)}")
        self._table, self._column, self._pixels, self.where = table, column, pixels, where
        with pillow_warnings():
            c, h, w = self._decode(0).shape
        self.shape = c, h, w

    def decoded(self) -> np.ndarray:
        """Decode to (N, C, H, W) uint8, each image put into its place as soon as it is decoded."""
        values = np.empty((len(self._table), *self.shape), np.uint8)
        with pillow_warnings():
            for row in range(len(values)):
                one = self._decode(row)
                if one.shape != self.shape:
                    raise UnmovedError(
                        f"hf: expected images of one size in {self.where}, came {self.shape} in row 0 and "
                        f"{one.shape} in row {row}; set size, for instance size = 32"
                    )
                values[row] = one
        return values

    def _decode(self, row: int) -> np.ndarray:
        return _pixels(self._table, row, self._column, self._pixels, self.where)


def _pixels(table: Any, row: int, column: str, pixels: Pixels, where: str) -> np.ndarray:
    try:
        image = table[row][column]  # the library decodes here
        if not isinstance(image, Image.Image):
            raise UnmovedError(f"expected an image in the column {column!r}, came a {type(image).__name__}")
        return pixels(image)
    except Exception as error:  # Pillow's plugins raise nearly anything on damaged bytes
        raise UnmovedError(f"hf: {where}, row {row}: {error}") from error


def _labels(columns: dict[str, list[Any]], label: str, table: Any) -> tuple[dict[str, np.ndarray], tuple[str, ...]]:
    """Convert labels to whole numbers, with the names of the classes of both splits."""
    values = [value for column in columns.values() for value in column]
    names = getattr(table.features[label], "names", None)  # the library's ClassLabel has them, other features do not
    if all(isinstance(value, str) for value in values):
        names = sorted(set(values))
        columns = {part: [names.index(value) for value in column] for part, column in columns.items()}
    elif not all(isinstance(value, int) and not isinstance(value, bool) for value in values):
        raise UnmovedError(f"hf: expected whole numbers or texts in the column {label!r}, came something else")
    elif names is None:
        names = numbered(f"hf: the column {label!r}", max(values, default=0))
    return {part: np.array(column, dtype=np.int64) for part, column in columns.items()}, tuple(names)
