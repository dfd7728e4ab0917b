"""Tar archives (plain, gzip, bzip2, xz) read in memory: nothing is extracted, only regular files are opened."""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from unmoved.errors import UnmovedError

SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.xz", ".txz", ".tar.bz2", ".tbz2")
LARGEST = 512 * 2**20  # bytes of one member; a file that claims more is an attack on the memory


def is_archive(path: Path) -> bool:
    """Whether the name is one of a tar archive."""
    return path.name.lower().endswith(SUFFIXES)


def stem(path: Path) -> str:
    """The name of a file without its archive suffixes: ``pets.tar.xz`` gives ``pets``."""
    lower = path.name.lower()
    return path.name[: -max((len(s) for s in SUFFIXES if lower.endswith(s)), default=0) or None]


class Archive:
    """A tar archive as a mapping of names to bytes; use `opened`.

    Attributes:
        files: size in bytes of each regular file, in the order of the archive.
        folders: the folders it names.

    Raises:
        UnmovedError: a damaged archive, or one with a link, a device or a name that climbs out of its folder.
    """

    def __init__(self, tar: tarfile.TarFile, path: Path) -> None:
        self._tar, self._path = tar, path
        self._members: dict[str, tarfile.TarInfo] = {}
        self.files: dict[str, int] = {}
        self.folders: set[str] = set()
        with _damage_named(path):
            for member in tar:
                self._add(member)
            self._require_end()

    def _add(self, member: tarfile.TarInfo) -> None:
        name = PurePosixPath(member.name)
        if name.is_absolute() or ".." in name.parts:
            raise UnmovedError(
                f"{self._path}: expected members inside the archive's own folder, came {member.name!r}, which climbs "
                "out of it; do not trust this archive"
            )
        if member.isdir():
            self.folders.add(str(name))
        elif not member.isreg():
            raise UnmovedError(
                f"{self._path}: expected regular files and folders, came the link or device {member.name!r}; "
                "pack again with tar --dereference --hard-dereference"
            )
        elif member.size > LARGEST:
            raise UnmovedError(
                f"{self._path}: expected members of at most {LARGEST} bytes, came {member.name!r} of {member.size}"
            )
        else:
            self._members[str(name)] = member
            self.files[str(name)] = member.size

    def _require_end(self) -> None:
        """Blocks of zeros end an archive; tarfile takes a damaged header in its middle for the end, silently."""
        stream = self._tar.fileobj
        members = self._tar.getmembers()
        if stream is None or not members:
            raise UnmovedError(f"{self._path}: expected files, came an empty archive")
        last = members[-1]
        stored = last.size if last.isreg() and not last.issparse() else 0
        if not last.issparse():
            stream.seek(last.offset_data + -(-stored // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE)
            if stream.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                raise UnmovedError(
                    f"{self._path}: expected the end of the archive after {last.name!r}, came damaged or missing data; "
                    "copy or download the archive again"
                )
        while stream.read(2**20):
            pass  # gzip and xz compare their checksums at the very end

    def read(self, name: str) -> bytes:
        """The bytes of one file; read in the archive's order, since a compressed archive cannot jump back cheaply."""
        member = self._members[name]
        with _damage_named(self._path):
            stream = self._tar.extractfile(member)
            data = stream.read() if stream is not None else b""
            if len(data) != member.size:
                raise EOFError(f"{name} ends after {len(data)} of {member.size} bytes")
            return data


@contextmanager
def opened(path: Path) -> Iterator[Archive]:
    """The archive while the block lasts."""
    with _damage_named(path):
        tar = tarfile.open(path, "r:*")  # noqa: SIM115
    with tar:
        yield Archive(tar, path)


@contextmanager
def _damage_named(path: Path) -> Iterator[None]:
    try:
        yield
    except UnmovedError:
        raise
    except Exception as error:  # bytes of strangers: tarfile, gzip, bz2, lzma and zlib each have errors of their own
        raise UnmovedError(
            f"{path}: expected a readable tar archive, came {type(error).__name__}: {error}; copy or download it again"
        ) from error
