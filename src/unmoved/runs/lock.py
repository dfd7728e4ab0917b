"""Lock a folder for one writer at a time, by a lock of the operating system that ends with its process."""

from __future__ import annotations

import errno
import os
import stat
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from unmoved.core.errors import UnmovedError
from unmoved.core.files import unwritten

# Not the library filelock: it leaves its file in the folder, since it does not notice that the file it has locked was
# removed meanwhile, and it fails where a network file system has no locks (ENOLCK, EOPNOTSUPP).
NAME = ".lock"
# Never follows a link, which may lead to another user's file, and never waits for the writer of a pipe.
_OPEN = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
_held: set[tuple[str, int]] = set()  # (folder, thread): a thread that holds a lock may enter it again

if sys.platform == "win32":
    import msvcrt

    def _take(descriptor: int) -> None:
        msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)

else:
    import fcntl

    def _take(descriptor: int) -> None:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Lock a folder inside the block; the folder is made if it is missing.

    The same thread may enter again. The lock of a process that ended or was killed is free.

    Raises:
        UnmovedError: another process holds the lock; a folder that cannot be made or written.
    """
    key = (str(folder.resolve()), threading.get_ident())
    if key in _held:
        yield
        return
    path = folder / NAME
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = _locked(path)
    except OSError as error:
        raise unwritten(path, error) from error
    _held.add(key)
    try:
        yield
    finally:
        _held.discard(key)
        with suppress(OSError):  # Windows cannot remove an open file; a file that is left locks nothing
            path.unlink()
        os.close(descriptor)


def _locked(path: Path) -> int:
    while True:
        descriptor = os.open(path, _OPEN, 0o666)
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            raise UnmovedError(f"{path}: expected a regular file, came something else; remove it")
        try:
            _take(descriptor)
            # Its last holder may have removed the file after we opened it: then this lock protects nothing.
            if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                return descriptor
        except FileNotFoundError:
            pass
        except OSError as error:
            if error.errno in (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK):
                return descriptor  # some network file systems have no locks: go on without one
            os.close(descriptor)
            if error.errno in (errno.EAGAIN, errno.EWOULDBLOCK, errno.EACCES, errno.EDEADLK):
                raise UnmovedError(
                    f"{path.parent}: another process trains or evaluates this run; expected to be the only one: wait "
                    "until it ends (or end it), then repeat the command"
                ) from error
            raise
        os.close(descriptor)
