"""Read tar archives (plain, gzip, bzip2, xz) in memory: nothing is extracted, only regular files are opened."""

from __future__ import annotations

import bz2
import gzip
import lzma
import tarfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from io import BufferedIOBase, BufferedReader
from pathlib import Path, PurePosixPath

from unmoved.core.errors import UnmovedError
from unmoved.core.untrusted import damage_explained, most_unpacked, regular
from unmoved.data.validation import LARGEST, require_file

KIND, SUFFIXES = "tar archive", (".tar", ".tar.gz", ".tgz", ".tar.xz", ".txz", ".tar.bz2", ".tbz2")
MOST_MEMBERS = 2_000_000
LONGEST, DEEPEST = 4096, 64  # a name's characters and folders
HEADER = 2**16  # bytes of a header that extends another one; tarfile reads it whole, whatever size it claims
_UNPACK: dict[bytes, Callable[[BufferedReader], BufferedIOBase]] = {
    b"\x1f\x8b": lambda raw: gzip.GzipFile(fileobj=raw),
    b"BZh": bz2.BZ2File,
    b"\xfd7zXZ": lzma.LZMAFile,
}
_EXTENSIONS = {tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.GNUTYPE_LONGNAME}
_EXTENSIONS |= {tarfile.GNUTYPE_LONGLINK}


def is_archive(path: Path) -> bool:
    """Return whether the name is one of a tar archive."""
    return path.name.lower().endswith(SUFFIXES)


def stem(path: Path) -> str:
    """Return the name of a file without its archive suffixes: ``pets.tar.xz`` gives ``pets``."""
    lower = path.name.lower()
    return path.name[: -max((len(s) for s in SUFFIXES if lower.endswith(s)), default=0) or None]


class Archive:
    """Present a tar archive as a mapping of names to bytes; use `opened`.

    Attributes:
        files: size in bytes of each regular file, in the order of the archive.
        folders: the folders it names.

    Raises:
        UnmovedError: a damaged archive or a bomb, or one with a link, a device, a sparse file, a name twice or a name
            that climbs out of its folder.
    """

    def __init__(self, tar: tarfile.TarFile, path: Path) -> None:
        self._tar, self._path = tar, path
        self._members: dict[str, tarfile.TarInfo] = {}
        self.files: dict[str, int] = {}
        self.folders: set[str] = set()
        with damage_explained(path, KIND):
            for number, member in enumerate(tar):
                if number == MOST_MEMBERS:
                    raise self._unexpected(f"at most {MOST_MEMBERS} members", "more; it may be a decompression bomb")
                self._add(member)
            self._require_end()

    def _unexpected(self, expected: str, came: str) -> UnmovedError:
        return UnmovedError(f"{self._path}: expected {expected}, came {came}")

    def _add(self, member: tarfile.TarInfo) -> None:
        path = PurePosixPath(member.name)
        name, shown = str(path), member.name[:200]
        if path.is_absolute() or ".." in path.parts:
            raise self._unexpected(
                "members inside the archive's own folder",
                f"{shown!r}, which climbs out of it; do not trust this archive",
            )
        if len(name) > LONGEST or len(path.parts) > DEEPEST or len(member.pax_headers) > HEADER // 64:
            raise self._unexpected(f"names of at most {LONGEST} characters and {DEEPEST} folders", f"{shown!r} ...")
        if member.isdir():
            self.folders.add(name)
        elif not member.isreg() or member.issparse():
            kind = "sparse file" if member.issparse() else "link or device"
            raise self._unexpected(
                "regular files and folders",
                f"the {kind} {shown!r}; pack again with tar --dereference --hard-dereference, without --sparse",
            )
        elif member.size > LARGEST:
            raise self._unexpected(f"members of at most {LARGEST} bytes", f"{shown!r} of {member.size}")
        elif name in self._members:
            raise self._unexpected("each file once", f"{shown!r} twice; pack again")
        else:
            self._members[name] = member
            self.files[name] = member.size

    def _require_end(self) -> None:
        """Check that blocks of zeros end it: tarfile takes a damaged header in its middle for the end, silently."""
        stream = self._tar.fileobj
        members = self._tar.getmembers()
        if stream is None or not members:
            raise UnmovedError(f"{self._path}: expected files, came an empty archive")
        last = members[-1]
        stored = last.size if last.isreg() else 0
        stream.seek(last.offset_data + -(-stored // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE)
        if stream.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise self._unexpected(
                f"the end of the archive after {last.name[:200]!r}",
                "damaged or missing data; copy or download the archive again",
            )
        while stream.read(2**20):
            pass  # gzip and xz compare their checksums at the very end

    def read(self, name: str) -> bytes:
        """Read the bytes of one file; do so in the archive's order: a compressed archive cannot jump back cheaply."""
        member = self._members[name]
        with damage_explained(self._path, KIND):
            stream = self._tar.extractfile(member)
            data = stream.read() if stream is not None else b""
            if len(data) != member.size:
                raise EOFError(f"{name} ends after {len(data)} of {member.size} bytes")
            return data


@contextmanager
def opened(path: Path) -> Iterator[Archive]:
    """Open the archive while the block lasts."""
    require_file("archive", path)
    with ExitStack() as files:
        with damage_explained(path, KIND):
            raw = files.enter_context(regular(path))
            start = raw.read(5)
            raw.seek(0)
            unpack = next((unpack for magic, unpack in _UNPACK.items() if start.startswith(magic)), None)
            unpacked: BufferedIOBase = raw if unpack is None else files.enter_context(unpack(raw))
            stream = _Bounded(unpacked, most_unpacked(path.stat().st_size))
            tar = files.enter_context(tarfile.open(fileobj=stream, mode="r:", tarinfo=_Member))  # type: ignore[call-overload]
        yield Archive(tar, path)


class _Member(tarfile.TarInfo):
    """Read a header, and refuse one that claims more than a header may."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> _Member:
        member = super().frombuf(buf, encoding, errors)
        if member.size < 0 or (member.type in _EXTENSIONS and member.size > HEADER):
            raise ValueError(f"a header of {member.size} bytes")
        return member


class _Bounded:
    """Read a stream, and end in an error where a bomb goes on."""

    def __init__(self, stream: BufferedIOBase, most: int) -> None:
        self._stream, self._most = stream, most
        self.tell = stream.tell

    def read(self, size: int) -> bytes:
        data = self._stream.read(size)
        if self.tell() > self._most:
            raise ValueError(f"more than {self._most} bytes, which may be a decompression bomb")
        return data

    def seek(self, position: int) -> int:
        if position > self._most:
            raise ValueError(f"more than {self._most} bytes, which may be a decompression bomb")
        return self._stream.seek(position)
