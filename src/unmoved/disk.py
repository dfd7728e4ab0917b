"""Files that are written whole or not at all, or grow line by line."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, cast

from unmoved.errors import UnmovedError

_TEMPORARY = re.compile(r"\.(.+)\.[0-9a-f]{32}\.tmp")


def write_atomic(path: Path, data: bytes, *, previous: Path | None = None) -> None:
    """Replace the file as a whole: a crash leaves the old one or the new one, never a part.

    Args:
        previous: as in `replacing`.

    Raises:
        UnmovedError: a full disk, or a folder that cannot be made or written.
    """
    with replacing(path, previous=previous) as file:
        file.write(data)


@contextlib.contextmanager
def replacing(path: Path, *, previous: Path | None = None) -> Iterator[BinaryIO]:
    """A file to write to, which takes the place of ``path`` as a whole once the block has ended without an error.

    Args:
        previous: the old file takes this name. A crash between the two renames leaves it alone, as ``previous``.

    Raises:
        UnmovedError: as `write_atomic`.
    """
    # Not tempfile: its files are readable by their owner alone, and the final one would stay so.
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "xb") as file:
            yield cast(BinaryIO, file)
            file.flush()
            os.fsync(file.fileno())
        if previous is not None and path.exists():
            os.replace(path, previous)
        os.replace(temporary, path)
    except OSError as error:
        raise unwritten(path, error) from error
    finally:
        with contextlib.suppress(OSError):  # after os.replace it is gone already
            temporary.unlink()


def append(path: Path, data: bytes, *, synced: bool = True) -> None:
    """Add to the end of a file. A crash may leave a part at the end.

    Args:
        synced: whether it is on disk when this returns, and no crash of the machine can lose it any more.

    Raises:
        UnmovedError: as `write_atomic`.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "ab") as file:
            file.write(data)
            file.flush()
            if synced:
                os.fsync(file.fileno())
    except OSError as error:
        raise unwritten(path, error) from error


def sync(path: Path) -> None:
    """Wait until what was appended to a file is on disk.

    Raises:
        UnmovedError: as `write_atomic`.
    """
    append(path, b"")


def cut(path: Path, size: int) -> None:
    """Take away what a file has beyond ``size`` bytes; a file that is missing has none.

    Raises:
        UnmovedError: as `write_atomic`.
    """
    try:
        if path.exists() and path.stat().st_size > size:
            os.truncate(path, size)
    except OSError as error:
        raise unwritten(path, error) from error


def remove_leftovers(folder: Path, *, older_than: float = 0.0, spare: str = "") -> None:
    """Remove what killed processes left half written in a folder: the temporary files of `write_atomic`, no others.

    Args:
        older_than: seconds; leave younger ones, where somebody else may be writing.
        spare: leave those of the file of this name.
    """
    for path in folder.glob(".*.tmp"):
        match = _TEMPORARY.fullmatch(path.name)
        with contextlib.suppress(OSError):  # somebody else has removed it, or it may not be removed: it harms nobody
            if match and match[1] != spare and time.time() - path.stat().st_mtime >= older_than:
                path.unlink()


def unwritten(path: Path, error: OSError) -> UnmovedError:
    """What to say where a file could not be written."""
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    what = "the disk is full" if full else str(error.strerror or error)
    return UnmovedError(
        f"could not write {path}: {what}; what was saved before is intact: free some space (or mend the folder) "
        "and repeat the command, with --resume where it trains"
    )
