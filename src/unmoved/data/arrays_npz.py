"""Load a user's own arrays from one .npz file."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from unmoved.core.errors import UnmovedError
from unmoved.core.untrusted import npz
from unmoved.data.dataset import DataSet, Unread
from unmoved.data.growing_array import Filling
from unmoved.data.split import ArraySplit, drawn_for_test, require_parts_are_meant
from unmoved.data.stored_arrays import Stored, stored
from unmoved.data.validation import MOST_CLASSES, as_classes, as_labels, numbered, require_path

SPLIT, WHOLE = ("x_train", "y_train", "x_test", "y_test"), ("x", "y")


def arrays(
    path: str | os.PathLike[str],
    *,
    layout: str | None = None,
    test: float | Literal["all"] = 0.2,
    seed: int = 0,
    lazily: bool = False,
) -> DataSet:
    """Load the arrays x_train, y_train, x_test, y_test of an .npz file, or x and y, split by the seed.

    Args:
        path: made with ``numpy.savez``; images uint8 or float in [0, 1], labels integers, optionally ``classes``, the
            class names.
        layout: ``"NCHW"`` or ``"NHWC"``, needed where the shape alone does not tell.
        test, seed: share or number of held-out samples and the seed of that choice, for x and y; ``"all"`` of them, for
            a model that is judged only.
        lazily: read the images of a part when they are asked for.

    Raises:
        UnmovedError: no such arrays, objects in place of numbers (they are pickles, and never loaded), a damaged file.
    """
    file = require_path("arrays.path", path)
    images = stored(file, ("x_train", "x_test", "x"))
    content = npz(file, ("y_train", "y_test", "y", "classes"))
    there = content.keys() | images.keys()
    named = _names(content["classes"], file) if "classes" in content else None
    if there >= set(SPLIT):
        require_parts_are_meant(str(file), test)
        labels = [content[key] for key in ("y_train", "y_test")]
        if named is None and all(y.dtype.kind in "iu" and y.size for y in labels):
            # A test part may lack the last class, so the class names are taken from both parts.
            named = list(numbered(f"{file}: labels", max(int(y.max()) for y in labels)))
        train, held = (
            _Source(f"{file}: {part}", images[f"x_{part}"], content[f"y_{part}"], named, layout).part()
            for part in ("train", "test")
        )
    elif there >= set(WHOLE):
        whole = _Source(str(file), images["x"], content["y"], named, layout)
        chosen = drawn_for_test(str(file), whole.labels, test, seed)
        train, held = whole.part(~chosen), whole.part(chosen)
    else:
        with np.load(file, allow_pickle=False) as whole_file:
            there = {f"{name:.80}" for name in whole_file.files[:20]}
        raise UnmovedError(
            f"{file}: expected arrays {', '.join(SPLIT)}, or x and y, came {', '.join(sorted(there)) or 'none'}; "
            "save with numpy.savez(file, x_train=..., ...)"
        )
    return DataSet.of(train, held, file.stem, lazily=lazily)


class _Source:
    """Hold labels and the description of images in a file; all but the pixels is checked on creation."""

    def __init__(
        self, name: str, images: Stored, labels: np.ndarray, classes: Sequence[str] | None, layout: str | None
    ) -> None:
        self.name, self._images, self._layout = name, images, layout
        self.shape = self._room(None).shape
        self.labels = as_labels(f"{name} labels", labels, images.shape[0])
        self.classes = as_classes(f"{name} classes", classes, int(self.labels.max()))

    def part(self, chosen: Tensor | None = None) -> Unread:
        """Return the samples where the mask is true; all without one."""
        mask = torch.ones(len(self.labels), dtype=torch.bool) if chosen is None else chosen
        index = mask.nonzero().flatten()

        def load() -> ArraySplit:
            images = self._images.picked(mask, self._room(len(index)))
            return ArraySplit(images, self.labels[index], index, self.classes, self.name)

        return Unread(index, self.classes, self.shape, load, self.name)

    def _room(self, count: int | None) -> Filling:
        return Filling(f"{self.name} images", self._images.shape, count=count, layout=self._layout)


def _names(classes: np.ndarray, file: Path) -> list[str]:
    try:
        if classes.size <= MOST_CLASSES:
            return [str(name) for name in classes.ravel()]
        came = f"{classes.size} names"
    except (SystemError, ValueError):  # numbers that are no code points
        came = "something else"
    raise UnmovedError(f"{file}: expected at most {MOST_CLASSES} class names in 'classes', came {came}")
