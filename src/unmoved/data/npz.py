"""A user's own arrays in one .npz file."""

from __future__ import annotations

import os
import zipfile
from pathlib import Path

import numpy as np

from unmoved.data.checks import require_path
from unmoved.data.splits import ArraySplit, DataSet
from unmoved.errors import UnmovedError

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
    content = _read(file)
    named = [str(name) for name in content["classes"].ravel()] if "classes" in content else None
    if all(key in content for key in SPLIT):
        labels = [content[key] for key in ("y_train", "y_test")]
        if named is None and all(y.dtype.kind in "iu" and y.size for y in labels):
            # A test part may lack the last class, so both take their names from both.
            named = [str(k) for k in range(max(int(y.max()) for y in labels) + 1)]
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


def _read(file: Path) -> dict[str, np.ndarray]:
    wanted = (*SPLIT, *WHOLE, "classes")
    if not zipfile.is_zipfile(file):
        raise UnmovedError(
            f"{file}: expected an .npz file, came something else; save with numpy.savez(file, x=..., y=...)"
        )
    try:
        with file.open("rb") as stream, np.load(stream, allow_pickle=False) as stored:
            found = {key: stored[key] for key in stored.files if key in wanted}
    except Exception as error:  # bytes of strangers: zipfile, zlib and numpy's header reader have errors of their own
        if "allow_pickle" in str(error):
            raise UnmovedError(
                f"{file}: expected arrays of numbers, came an array of objects, which is a pickle and never loaded; "
                "save uint8 or float images and integer labels with numpy.savez"
            ) from error
        raise UnmovedError(
            f"{file}: expected a readable .npz file, came {type(error).__name__}: {error}; save or copy it again"
        ) from error
    for key, value in found.items():
        if not isinstance(value, np.ndarray):  # numpy hands out a member that is no array as bytes
            raise UnmovedError(f"{file}: expected an array {key!r}, came something else; save with numpy.savez")
    return found
