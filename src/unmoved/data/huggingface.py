"""Load data sets of the Hugging Face hub, or local ones, through the ``datasets`` library (an extra)."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from functools import partial
from types import ModuleType
from typing import Protocol, overload

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from unmoved.core.errors import UnmovedError
from unmoved.data.dataset import DataSet, Unread
from unmoved.data.decode import Pixels, pillow_warnings
from unmoved.data.split import ArraySplit
from unmoved.data.validation import as_classes, as_labels, numbered


class _Table(Protocol):
    """The part of a split of the library that is used here: a table of columns and rows."""

    @property
    def column_names(self) -> Sequence[str]: ...

    @property
    def features(self) -> Mapping[str, object]: ...

    def __len__(self) -> int: ...

    @overload
    def __getitem__(self, key: int) -> Mapping[str, object]: ...

    @overload
    def __getitem__(self, key: str) -> Sequence[object]: ...


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
    """Load images and labels of two splits of ``datasets.load_dataset(name)``.

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
    for table in tables.values():
        _require_column(table, label, name)
    labels, classes = _labels({part: list(table[label]) for part, table in tables.items()}, label, tables[train])
    parts = []
    for part, values in labels.items():
        y = as_labels(f"{name}/{part} labels", values, len(tables[part]))
        names = as_classes(f"{name}/{part} classes", classes, int(y.max()))
        parts.append(Unread(torch.arange(len(y)), names, images[part].shape, partial(_load, images[part], y, names)))
    return DataSet.of(parts[0], parts[1], name, lazily=lazily)


def _load(images: _Images, y: Tensor, classes: tuple[str, ...]) -> ArraySplit:
    return ArraySplit(torch.from_numpy(images.decoded()), y, torch.arange(len(y)), classes, images.where)


def _table(library: ModuleType, name: str, part: str) -> _Table:
    try:
        table: _Table = library.load_dataset(name, split=part)
        return table
    except Exception as error:  # network, hub, parquet and builder errors have no common ancestor
        raise UnmovedError(
            f"hf: expected the split {part!r} of the data set {name!r}, came {type(error).__name__}: {error}; "
            "correct the name, or say which splits to use with train and test"
        ) from error


def _require_column(table: _Table, column: str, where: str) -> None:
    if column not in table.column_names:
        raise UnmovedError(f"hf: expected a column {column!r} in {where}, came {', '.join(table.column_names)}")


class _Images:
    """Read a column of images; the first is decoded to find their shape and mode."""

    def __init__(self, table: _Table, column: str | None, pixels: Pixels, where: str) -> None:
        if not len(table):
            raise UnmovedError(f"hf: expected images in {where}, came an empty split")
        if column is None:
            columns = [key for key, value in table[0].items() if isinstance(value, Image.Image)]
            if len(columns) != 1:
                raise UnmovedError(
                    f"hf: expected one column of images in {where}, came {columns or 'none'}; say image = ..."
                )
            column = columns[0]
        _require_column(table, column, where)
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


def _pixels(table: _Table, row: int, column: str, pixels: Pixels, where: str) -> np.ndarray:
    try:
        image = table[row][column]  # the library decodes here
        if not isinstance(image, Image.Image):
            raise UnmovedError(f"expected an image in the column {column!r}, came a {type(image).__name__}")
        return pixels(image)
    except Exception as error:  # Pillow's plugins raise nearly anything on damaged bytes
        raise UnmovedError(f"hf: {where}, row {row}: {error}") from error


def _labels(
    columns: dict[str, list[object]], label: str, table: _Table
) -> tuple[dict[str, np.ndarray], tuple[str, ...]]:
    """Convert labels to whole numbers, with the names of the classes of both splits."""
    values = [value for column in columns.values() for value in column]
    texts = sorted({value for value in values if isinstance(value, str)})
    numbers = [value for value in values if isinstance(value, int) and not isinstance(value, bool)]
    if all(isinstance(value, str) for value in values):
        place = {text: number for number, text in enumerate(texts)}
        return {p: np.array([place[str(v)] for v in column]) for p, column in columns.items()}, tuple(texts)
    if len(numbers) < len(values):
        raise UnmovedError(f"hf: expected whole numbers or texts in the column {label!r}, came something else")
    names = getattr(table.features[label], "names", None)  # the library's ClassLabel has them, other features do not
    if names is None:
        names = numbered(f"hf: the column {label!r}", max(numbers, default=0))
    return {part: np.array(column, dtype=np.int64) for part, column in columns.items()}, tuple(names)
