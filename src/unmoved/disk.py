"""Files that are written whole or not at all, or grow line by line."""

from __future__ import annotations

import contextlib
import errno
import os
import uuid
from pathlib import Path

from unmoved.errors import UnmovedError


def write_atomic(path: Path, data: bytes) -> None:
    """Replace the file as a whole: a crash leaves the old one or the new one, never a part.

    Raises:
        UnmovedError: a full disk, or a folder that cannot be made or written.
    """
    # Not tempfile: its files are readable by their owner alone, and the final one would stay so.
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        _write(temporary, "xb", data)
        os.replace(temporary, path)
    except OSError as error:
        raise _unwritten(path, error) from error
    finally:
        with contextlib.suppress(OSError):  # after os.replace it is gone already
            temporary.unlink()


def append(path: Path, data: bytes) -> None:
    """Add to the end of a file; it is on disk when this returns. A crash may leave a part at the end.

    Raises:
        UnmovedError: as `write_atomic`.
    """
    try:
        _write(path, "ab", data)
    except OSError as error:
        raise _unwritten(path, error) from error


def _write(path: Path, mode: str, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, mode) as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _unwritten(path: Path, error: OSError) -> UnmovedError:
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    what = "the disk is full" if full else str(error.strerror or error)
    return UnmovedError(
        f"could not write {path}: {what}; what was saved before is intact: free some space (or mend the folder) "
        "and repeat the command, with --resume where it trains"
    )
