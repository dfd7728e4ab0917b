"""Check the arrays of an .npz file before reading them, and read them a few rows at a time."""

from __future__ import annotations

import math
import zipfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import Tensor

from unmoved.core.errors import UnmovedError
from unmoved.core.untrusted import array_header, damage_explained, npz, regular
from unmoved.data.growing_array import PIECE, Filling, as_own, pieces


@dataclass(frozen=True)
class Stored:
    """Refer to an array of numbers in a file.

    Attributes:
        path, member: the .npz file and the name inside.
        shape, dtype: of the array.
    """

    path: Path
    member: str
    shape: tuple[int, ...]
    dtype: np.dtype[np.generic]

    def pieces(self) -> Iterator[Tensor]:
        """Iterate over all rows, a few megabytes at a time; an array in Fortran order is read as a whole first.

        Raises:
            UnmovedError: damaged or missing bytes, or another array than before.
        """
        with _opened(self.path) as archive, archive.open(self.member) as stream:
            shape, columns, dtype = array_header(str(self.path), stream, archive.getinfo(self.member).file_size)
            if (shape, dtype) != (self.shape, self.dtype):
                raise UnmovedError(f"{self.path}: expected {self.member} as it was, came another: the file was changed")
            row = math.prod(shape[1:]) * dtype.itemsize
            step = shape[0] if columns else max(1, PIECE // max(row, 1))
            for start in range(0, shape[0], step):
                count = min(step, shape[0] - start)
                data = stream.read(count * row)
                if len(data) < count * row:
                    raise EOFError(f"{self.member} ends after {start * row + len(data)} bytes")
                values = np.frombuffer(data, dtype)
                if columns:
                    yield from pieces(values.reshape(shape[::-1]).T)
                else:
                    yield as_own(values.reshape(count, *shape[1:]))
            while stream.read(PIECE):
                pass  # the checksum is compared at the very end

    def picked(self, mask: Tensor, room: Filling) -> Tensor:
        """Put the images where the mask (N,) is true into this room for as many."""
        done = 0
        for piece in self.pieces():
            room.put(piece[mask[done : done + len(piece)]])
            done += len(piece)
        return room.images


def stored(path: Path, keys: Collection[str]) -> dict[str, Stored]:
    """Return those of the arrays that the .npz file has.

    Raises:
        UnmovedError: as `unmoved.core.untrusted.npz`; what is no array of numbers of at most 64 bits.
    """
    npz(path, ())  # whether it is such a file, and no bomb
    found = {}
    with _opened(path) as archive:
        members = {name.removesuffix(".npy"): name for name in archive.namelist()}
        for key in members.keys() & set(keys):
            member = archive.getinfo(members[key])
            with archive.open(member) as stream:
                shape, _, dtype = array_header(f"{path}: {key!r}", stream, member.file_size)
            if dtype.kind not in "uif" or dtype.itemsize > 8:
                raise UnmovedError(f"{path}: {key!r}: expected numbers, came a numpy array of {dtype!s:.80}")
            found[key] = Stored(path, members[key], shape, dtype)
    return found


@contextmanager
def _opened(path: Path) -> Iterator[zipfile.ZipFile]:
    explained = damage_explained(path, ".npz file", "save or copy it again")
    with explained, regular(path) as raw, zipfile.ZipFile(raw) as archive:
        yield archive
