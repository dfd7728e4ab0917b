"""A user's own arrays in one .npz file."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from unmoved.data.checks import MOST_CLASSES, numbered, require_path
from unmoved.data.splits import ArraySplit, DataSet
from unmoved.errors import UnmovedError
from unmoved.reading import npz

SPLIT, WHOLE = ("x_train", "y_train", "x_test", "y_test"), ("x", "y")


def arrays(path: str | os.PathLike[str], *, layout: str | None = None, test: float = 0.2, seed: int = 0) -> DataSet:
    """The arrays x_train, y_train, x_test, y_test of an .npz file, or x and y, split by the seed.

    Args:
        path: made with ``numpy.savez``; images uint8 or float in [0, 1], labels integers, optionally ``classes``, the
            class names.
        layout: ``"NCHW"`` or ``"NHWC"``, needed where the shape alone does not tell.
        test, seed: share or number of held-out samples, and the seed of that choice, for x and y.

    Raises:
        UnmovedError: no such arrays, objects in place of numbers (they are pickles, and never loaded), a damaged file.
    """
    file = require_path("arrays.path", path)
    content = npz(file, (*SPLIT, *WHOLE, "classes"))
    named = _names(content["classes"], file) if "classes" in content else None
    if all(key in content for key in SPLIT):
        labels = [content[key] for key in ("y_train", "y_test")]
        if named is None and all(y.dtype.kind in "iu" and y.size for y in labels):
            # A test part may lack the last class, so both take their names from both.
            named = list(numbered(f"{file}: labels", max(int(y.max()) for y in labels)))
        train, held = (
            ArraySplit.of(
                content[f"x_{part}"], content[f"y_{part}"], classes=named, layout=layout, name=f"{file}: {part}"
            )
            for part in ("train", "test")
        )
        return DataSet.of(train, held, file.stem)
    if all(key in content for key in WHOLE):
        whole = ArraySplit.of(content["x"], content["y"], classes=named, layout=layout, name=str(file))
        return DataSet.of(*whole.hold_out(test, seed), name=file.stem)
    raise UnmovedError(
        f"{file}: expected arrays {', '.join(SPLIT)}, or x and y, came {', '.join(sorted(content)) or 'none'}; "
        "save with numpy.savez(file, x_train=..., ...)"
    )


def _names(classes: np.ndarray, file: Path) -> list[str]:
    try:
        if classes.size <= MOST_CLASSES:
            return [str(name) for name in classes.ravel()]
        came = f"{classes.size} names"
    except (SystemError, ValueError):  # numbers that no character has
        came = "something else"
    raise UnmovedError(f"{file}: expected at most {MOST_CLASSES} class names in 'classes', came {came}")
