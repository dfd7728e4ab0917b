"""Hold the training and the test part of a data set, and read the images of a part when they are first asked for."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass, replace

from unmoved.core.batch import Index
from unmoved.core.errors import UnmovedError, require_whole
from unmoved.data.split import ArraySplit, positions_of_part


@dataclass(frozen=True, eq=False)
class Unread:
    """Describe a part of a data set whose images are not read yet.

    Attributes:
        index: (N,) int64, as in `ArraySplit`.
        classes, shape, name: as in `ArraySplit`.
        load: reads the part.
    """

    index: Index
    classes: tuple[str, ...]
    shape: tuple[int, int, int]
    load: Callable[[], ArraySplit]
    name: str = "data"

    def __len__(self) -> int:
        return len(self.index)

    @property
    def num_classes(self) -> int:
        return len(self.classes)


class DataSet:
    """Hold a training and a test split of the same classes and image shape, as every source returns them.

    An unread part is read when it is first used, and again if it has been released since.

    Args:
        train, test: the parts.
        name: the source, without the part.
        skipped: unreadable files that were left out, if the user allowed that.

    Raises:
        UnmovedError: the two parts do not belong together.
    """

    def __init__(
        self, train: ArraySplit | Unread, test: ArraySplit | Unread, name: str = "data", skipped: tuple[str, ...] = ()
    ) -> None:
        self.name, self.skipped = name, skipped
        self._parts = {"train": train, "test": test}
        self._held: dict[str, weakref.ref[ArraySplit]] = {}
        if train.shape != test.shape or train.classes != test.classes:
            raise UnmovedError(
                f"{name}: expected the same image shape and classes in both parts, came train {train.shape} "
                f"with {train.num_classes} classes, test {test.shape} with {test.num_classes}"
            )

    @property
    def train(self) -> ArraySplit:
        return self._read("train")

    @property
    def test(self) -> ArraySplit:
        return self._read("test")

    @property
    def classes(self) -> tuple[str, ...]:
        return self._parts["train"].classes

    @property
    def shape(self) -> tuple[int, int, int]:
        """Return (C, H, W) of one image."""
        return self._parts["train"].shape

    def index(self, part: str) -> Index:
        """Return the identities of the samples of ``"train"`` or ``"test"`` without reading an image."""
        return self._parts[part].index

    def read(self) -> DataSet:
        """Return the same with both parts in memory."""
        return DataSet(self.train, self.test, self.name, self.skipped)

    def part_of_train(self, number: int, of: int, permutation: int = 0) -> DataSet:
        """Replace the training data by one of ``of`` disjoint parts of it; see `ArraySplit.part`."""
        train = self._parts["train"]
        if isinstance(train, ArraySplit):
            return DataSet(train.part(number, of, permutation), self._parts["test"], self.name, self.skipped)
        of = require_whole(f"{train.name}: number of parts", of, at_least=1)
        number = require_whole(f"{train.name}: part", number, at_least=0, at_most=of - 1)
        if of > len(train):
            raise UnmovedError(f"{train.name}: expected at most {len(train)} parts, as many as samples, came {of}")
        index = train.index[positions_of_part(len(train), number, of, permutation)]
        load = train.load
        part = replace(train, index=index, load=lambda: load().part(number, of, permutation))
        return DataSet(part, self._parts["test"], self.name, self.skipped)

    def _read(self, which: str) -> ArraySplit:
        part = self._parts[which]
        if isinstance(part, ArraySplit):
            return part
        held = self._held.get(which, lambda: None)()
        if held is None:
            held = replace(part.load(), name=part.name)
            if held.shape != part.shape or len(held) != len(part):
                raise UnmovedError(f"{part.name}: expected {len(part)} images {part.shape}, came others")
            self._held[which] = weakref.ref(held)
        return held

    @staticmethod
    def of(
        train: ArraySplit | Unread,
        test: ArraySplit | Unread,
        name: str,
        skipped: tuple[str, ...] = (),
        *,
        lazily: bool = True,
    ) -> DataSet:
        """Make a data set of two parts, renamed ``name/train`` and ``name/test``; read them now unless ``lazily``."""
        made = DataSet(replace(train, name=f"{name}/train"), replace(test, name=f"{name}/test"), name, skipped)
        return made if lazily else made.read()
