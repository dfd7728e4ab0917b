"""Data sets of the Hugging Face hub, or local ones, through the ``datasets`` library (an extra)."""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np
from PIL import Image

from unmoved.data.checks import numbered
from unmoved.data.decode import Pixels, pillow_warnings
from unmoved.data.splits import ArraySplit, DataSet
from unmoved.errors import UnmovedError


def hf(
    name: str,
    *,
    image: str | None = None,
    label: str = "label",
    train: str = "train",
    test: str = "test",
    size: int | tuple[int, int] | None = None,
    grey: bool = False,
) -> DataSet:
    """Images and labels of two splits of ``datasets.load_dataset(name)``.

    Args:
        image: the column of images; the only one that holds images unless given.
        label: the column of labels: class labels, whole numbers 0..K-1, or texts (classes in alphabetical order).
        train, test: names of the two splits.
        size, grey: as in `folder`.

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
    images = {part: _images(table, image, pixels, f"{name}/{part}") for part, table in tables.items()}
    labels, classes = _labels(
        {part: _column(table, label, name) for part, table in tables.items()}, label, tables[train]
    )
    splits = [
        ArraySplit.of(images[part], labels[part], classes=classes, name=f"{name}/{part}", layout="NCHW")
        for part in (train, test)
    ]
    return DataSet.of(splits[0], splits[1], name)


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


def _images(table: Any, column: str | None, pixels: Pixels, where: str) -> np.ndarray:
    if not len(table):
        raise UnmovedError(f"hf: expected images in {where}, came an empty split")
    if column is None:
        found = [key for key, value in table[0].items() if isinstance(value, Image.Image)]
        if len(found) != 1:
            raise UnmovedError(f"hf: expected one column of images in {where}, came {found or 'none'}; say image = ...")
        column = found[0]
    if column not in table.column_names:
        raise UnmovedError(f"hf: expected a column {column!r} in {where}, came {', '.join(table.column_names)}")
    values: list[np.ndarray] = []
    with pillow_warnings():
        for row in range(len(table)):
            values.append(_pixels(table, row, column, pixels, where))
            if values[-1].shape != values[0].shape:
                raise UnmovedError(
                    f"hf: expected images of one size in {where}, came {values[0].shape} in row 0 and "
                    f"{values[-1].shape} in row {row}; set size, for instance size = 32"
                )
    return np.stack(values)


def _pixels(table: Any, row: int, column: str, pixels: Pixels, where: str) -> np.ndarray:
    try:
        image = table[row][column]  # the library decodes here
        if not isinstance(image, Image.Image):
            raise UnmovedError(f"expected an image in the column {column!r}, came a {type(image).__name__}")
        return pixels(image)
    except Exception as error:  # Pillow's plugins raise nearly anything on damaged bytes
        raise UnmovedError(f"hf: {where}, row {row}: {error}") from error


def _labels(columns: dict[str, list[Any]], label: str, table: Any) -> tuple[dict[str, np.ndarray], tuple[str, ...]]:
    """Labels as whole numbers, with the names of the classes of both splits."""
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
