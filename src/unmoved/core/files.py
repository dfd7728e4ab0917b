"""Write files atomically, one or several together, and append to files that grow line by line."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import time
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import BinaryIO, cast

from unmoved.core import untrusted
from unmoved.core.errors import UnmovedError

_FOLDER = ".folder"  # ends the name of a file that says which folder takes the place of another
_SOURCE = re.compile(r"\.[a-z]+-[0-9a-f]+")
_TEMPORARY = re.compile(r"\.(.+)\.[0-9a-f]{32}\.tmp")


def write_atomic(path: Path, data: bytes, *, previous: Path | None = None) -> None:
    """Replace the file as a whole: after a crash it is the old one or the new one, never a part.

    Args:
        previous: as in `replacing`.

    Raises:
        UnmovedError: a full disk, or a folder that cannot be made or written.
    """
    with replacing(path, previous=previous) as file:
        file.write(data)


@contextlib.contextmanager
def replacing(path: Path, *, previous: Path | None = None) -> Iterator[BinaryIO]:
    """Open a temporary file that replaces ``path`` as a whole when the block ends without an error.

    Args:
        previous: the old file is renamed to this. After a crash between the two renames only ``previous`` exists.

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


def write_set(folder: Path, name: str, files: Mapping[str, bytes], folders: Mapping[str, str] = {}) -> None:
    """Replace several files of a folder together: a crash leaves all the old ones or all the new ones.

    The new files are first written beside the old ones. One rename to ``.NAME.new`` makes them the valid set, and each
    file is then moved from there to its place; between these renames `latest` finds a file.

    Args:
        name: what the set is called; a folder may hold several.
        files: name, or path below the folder -> content.
        folders: name -> the folder beside it that replaces it; "" to remove it without a replacement.

    Raises:
        UnmovedError: as `write_atomic`; the old files are as they were.
    """
    finish_set(folder, name)  # of the last set, if a crash came between its renames
    staged, valid = folder / f".{name}.{uuid.uuid4().hex}.tmp", folder / f".{name}.new"
    writing = folder / name
    try:
        staged.mkdir(parents=True)
        for file, data in files.items():
            writing = folder / file
            if writing.is_dir():
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
            _write(staged / file, data)
        for place, source in folders.items():
            writing = folder / place
            (folder / source).mkdir(exist_ok=True)
            _write(staged / f"{place}{_FOLDER}", source.encode())
        os.replace(staged, valid)
    except OSError as error:
        raise unwritten(writing, error) from error
    finally:
        shutil.rmtree(staged, ignore_errors=True)
    finish_set(folder, name)


def _write(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def finish_set(folder: Path, name: str) -> None:
    """Move the files of a complete set to their places, if `write_set` was interrupted before it did so.

    Raises:
        UnmovedError: a folder that cannot be written.
    """
    valid = folder / f".{name}.new"
    if valid.is_symlink() or not valid.is_dir():  # what a link leads to was never written here
        return
    try:
        for mark in valid.glob(f"*{_FOLDER}"):
            _replace_folder(folder / mark.name.removesuffix(_FOLDER), untrusted.content(mark, 100).decode())
        for above, _, names in os.walk(valid, topdown=False):  # a page after the pictures that it shows
            for file in sorted(names):
                if not file.endswith(_FOLDER):
                    place = folder / Path(above).relative_to(valid) / file
                    place.parent.mkdir(parents=True, exist_ok=True)
                    os.replace(Path(above) / file, place)
        shutil.rmtree(valid)
    except (OSError, ValueError) as error:
        raise UnmovedError(
            f"{valid}: saved, but its files cannot be put into their places in {folder} "
            f"({getattr(error, 'strerror', None) or error}); mend that, and the next command does it"
        ) from error


def _replace_folder(place: Path, source: str) -> None:
    new = place.with_name(source) if _SOURCE.fullmatch(source) else None
    if new is not None and (new.is_symlink() or not new.is_dir()):
        return  # it is in its place already
    if place.is_dir() and not place.is_symlink():
        shutil.rmtree(place)
    if new is not None:
        os.replace(new, place)


def latest(folder: Path, name: str, file: str) -> Path:
    """Return where a file of a set is: in its place, or still in the folder of an interrupted `write_set`."""
    valid = folder / f".{name}.new" / file
    return valid if os.path.lexists(valid) else folder / file


def append(path: Path, data: bytes, *, synced: bool = True) -> None:
    """Append to a file. A crash may leave a part of the data at its end.

    Args:
        synced: whether to wait until the data is on disk, so that a crash of the machine cannot lose it.

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
    """Wait until everything appended to a file is on disk.

    Raises:
        UnmovedError: as `write_atomic`.
    """
    append(path, b"")


def cut(path: Path, size: int) -> None:
    """Truncate a file to ``size`` bytes; a missing file counts as empty.

    Raises:
        UnmovedError: as `write_atomic`.
    """
    try:
        if path.exists() and path.stat().st_size > size:
            os.truncate(path, size)
    except OSError as error:
        raise unwritten(path, error) from error


def remove_leftovers(folder: Path, *, older_than: float = 0.0, spare: str = "") -> None:
    """Remove temporary files of `write_atomic` and `write_set` that killed processes left in a folder.

    Args:
        older_than: seconds; younger files are left, since another process may be writing them.
        spare: the temporary files of the file of this name are left.
    """
    for path in folder.glob(".*.tmp"):
        match = _TEMPORARY.fullmatch(path.name)
        with contextlib.suppress(OSError):  # already removed, or not permitted: a leftover does no harm
            if match and match[1] != spare and time.time() - path.lstat().st_mtime >= older_than:
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def is_temporary(name: str) -> bool:
    """Return whether a file or folder of this name is one of `write_atomic` or `write_set` that is not finished."""
    return _TEMPORARY.fullmatch(name) is not None


def unwritten(path: Path, error: OSError) -> UnmovedError:
    """Make the `UnmovedError` for a file that could not be written."""
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    what = "the disk is full" if full else str(error.strerror or error)
    mend = "free some space" if full else "mend the folder"
    return UnmovedError(
        f"could not write {path}: {what}; what was saved before is intact: {mend} and repeat the command (train goes "
        "on with --resume)"
    )
