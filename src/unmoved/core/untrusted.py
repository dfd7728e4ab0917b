"""Read TOML, JSON and .npz files from untrusted sources, with limits on size, depth, numbers and keys.

Ordinary parsers are not made for hostile files: a few hundred brackets crash them, a long dotted key or a number of a
million digits takes hours, a small archive fills the memory, and deeply nested tables crash code that prints or copies
them. Opening a pipe without a writer blocks for ever, and reading a device never ends.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import stat
import tomllib
import zipfile
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path
from typing import IO, BinaryIO, TypeAlias

import numpy as np

from unmoved.core.errors import UnmovedError, is_want_of_memory

# A parsed JSON or TOML document of unknown keys. For type checkers it is pydantic.JsonValue, which fields of pydantic
# models need; at run time this module does not import pydantic.
JsonValue: TypeAlias = "str | int | float | bool | list[JsonValue] | dict[str, JsonValue] | None"
Json: TypeAlias = "dict[str, JsonValue]"

LONGEST = 2**18  # characters of a TOML file; a recipe has two thousand
MOST_JSON = 2**24  # bytes; parsed, they may take thirty times as much memory
DOTS = 200  # in a line: tomllib's time grows with the square of a key's parts
DEEPEST = 32  # tables and lists inside each other
# Largest expansion of compressed files: far more than images and arrays need, far less than a bomb (1000 times).
ROOM, GROWTH = 2**30, 100
_UNPAIRED = re.compile("[\ud800-\udfff]")  # surrogates, which Python makes of undecodable bytes and UTF-8 cannot encode
WHOLE = range(-(2**63), 2**63)  # the integers of TOML


# A pipe is opened without waiting for its writer.
_READING = os.O_RDONLY | sum(getattr(os, name, 0) for name in ("O_BINARY", "O_CLOEXEC", "O_NOCTTY", "O_NONBLOCK"))
_KINDS = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a named pipe", stat.S_IFSOCK: "a socket"}


def regular(path: Path) -> BufferedReader:
    """Open a regular file, or a link to one, for reading.

    Raises:
        FileNotFoundError: there is nothing of this name.
        UnmovedError: a folder, a pipe, a device or a socket; a file that may not be read.
    """
    try:
        require_regular(path, os.stat(path))  # before opening, which may already have an effect on a device
        descriptor = os.open(path, _READING)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise FileNotFoundError(error.errno, error.strerror, str(path)) from None
    except OSError as error:
        raise UnmovedError(f"{path}: expected a readable file, came: {error.strerror or error}") from error
    except UnmovedError:
        raise
    except ValueError as error:  # characters that no path can have
        raise UnmovedError(f"{str(path)!r:.500}: expected the path of a file, came: {brief(error)}") from error
    try:
        require_regular(path, os.fstat(descriptor))  # the file may have been replaced meanwhile
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def require_regular(path: Path, status: os.stat_result) -> None:
    """Raise `UnmovedError` unless this is the status of a regular file."""
    if not stat.S_ISREG(status.st_mode):
        kind = _KINDS.get(stat.S_IFMT(status.st_mode), "a device")
        raise UnmovedError(f"{path}: expected a regular file, came {kind}; correct the path, or remove it")


def digest(path: Path) -> str:
    """Compute the sha256 of a regular file.

    Raises:
        FileNotFoundError, UnmovedError: as `regular`.
    """
    with regular(path) as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def content(path: Path, most: int) -> bytes:
    """Read the bytes of a regular file.

    Raises:
        FileNotFoundError: there is nothing of this name.
        UnmovedError: as `regular`; more than ``most`` bytes.
    """
    with regular(path) as stream:
        size = os.fstat(stream.fileno()).st_size
        try:
            data = stream.read(most + 1) if size <= most else b""
        except OSError as error:
            raise UnmovedError(f"{path}: expected a readable file, came: {error.strerror or error}") from error
    if max(size, len(data)) > most:
        raise UnmovedError(f"{path}: expected at most {most} bytes, came {max(size, len(data))}; is it the right file?")
    return data


def toml(text: str, where: str) -> Json:
    """Parse the tables of a TOML text.

    Raises:
        UnmovedError: no TOML, or beyond the bounds; it names ``where``.
    """
    if len(text) > LONGEST:
        raise UnmovedError(f"{where}: expected at most {LONGEST} characters, came {len(text)}")
    for number, line in enumerate(text.split("\n"), start=1):
        if line.count(".") > DOTS:
            raise UnmovedError(f"{where}: line {number}: expected at most {DOTS} dots, came more; break the line")
    try:
        tables = tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        raise UnmovedError(f"{where}: not valid TOML: {str(error)[:300]}") from error
    require_plain(tables, where)
    return tables


def text_file(path: Path, where: str) -> str:
    """Read a text file.

    Raises:
        FileNotFoundError: there is none.
        UnmovedError: as `content`; text that is not UTF-8.
    """
    try:
        return content(path, 4 * LONGEST).decode()
    except UnicodeDecodeError as error:
        raise UnmovedError(f"{where}: expected text in UTF-8, came something else: {brief(error)}") from error


def toml_file(path: Path, where: str = "") -> Json:
    """Read the tables of a TOML file.

    Raises:
        FileNotFoundError: there is none.
        UnmovedError: as `text_file` and `toml`.
    """
    where = where or str(path)
    return toml(text_file(path, where), where)


def json_object(text: str | bytes, where: str) -> Json:
    """Parse the object of a JSON text.

    Raises:
        UnmovedError: no JSON in UTF-8, no object, a key twice, or beyond the bounds; it names ``where``.
    """
    try:
        # Strictly UTF-8: json guesses at other encodings.
        value = json.loads(text.decode() if isinstance(text, bytes) else text, object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        raise UnmovedError(f"{where}: not valid JSON ({brief(error)}); the file was changed or torn") from error
    if not isinstance(value, dict):
        came = type(value).__name__
        raise UnmovedError(f"{where}: expected a JSON object, came a {came}; the file was changed or torn")
    require_plain(value, where)
    return value


def json_file(path: Path) -> Json:
    """Read the object of a JSON file.

    Raises:
        FileNotFoundError: there is none.
        UnmovedError: as `content` and `json_object`.
    """
    return json_object(content(path, MOST_JSON), str(path))


def json_lines(text: str | bytes, where: str) -> list[Json]:
    """Parse the objects of a text with one JSON object on each line.

    Raises:
        UnmovedError: as `json_object`; it names the line.
    """
    data = text.encode() if isinstance(text, str) else text
    lines = data.removesuffix(b"\n").split(b"\n") if data else []
    return [json_object(line, f"{where}: line {number}") for number, line in enumerate(lines, start=1)]


def _once(pairs: list[tuple[str, JsonValue]]) -> Json:
    """Make an object of its pairs; raise ValueError where a key comes twice."""
    value = dict(pairs)
    if len(value) < len(pairs):
        raise ValueError("a key comes twice")
    return value


def npz(path: Path, wanted: Collection[str] | None = None) -> dict[str, np.ndarray]:
    """Read the arrays of an .npz file, or those of them that are wanted.

    Raises:
        UnmovedError: no .npz file, a damaged one, a bomb, or one with objects, which are pickles and never loaded.
    """
    try:
        stream = regular(path)
    except FileNotFoundError:
        raise UnmovedError(f"{path}: expected an .npz file, came none; correct the path") from None
    with stream:
        if not zipfile.is_zipfile(stream):
            raise UnmovedError(
                f"{path}: expected an .npz file, came something else; save with numpy.savez(file, x=..., y=...)"
            )
        with damage_explained(path, ".npz file", "save or copy it again"):
            _require_no_bomb(path, stream, wanted)
            with np.load(stream, allow_pickle=False) as stored:
                return {key: stored[key] for key in stored.files if wanted is None or key in wanted}


def _require_no_bomb(path: Path, stream: BinaryIO, wanted: Collection[str] | None) -> None:
    """Check the sizes that the archive and its arrays announce, before numpy allocates memory for them.

    zipfile never returns more than the archive announces.
    """
    most = most_unpacked(os.fstat(stream.fileno()).st_size)
    stream.seek(0)
    with zipfile.ZipFile(stream) as archive:
        size = sum(member.file_size for member in archive.infolist())
        if size > most:
            raise UnmovedError(
                f"{path}: expected at most {most} bytes in a file of this size, came {size}; it may be a "
                "decompression bomb; if it is yours, save it with numpy.savez, which does not compress"
            )
        for member in archive.infolist():
            key = member.filename.removesuffix(".npy")
            if wanted is None or key in wanted or member.filename in wanted:
                with archive.open(member) as unpacked:
                    array_header(f"{path}: {key!r:.80}", unpacked, member.file_size)
    stream.seek(0)


def array_header(where: str, unpacked: IO[bytes], size: int) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Read an array's header: (shape, whether it is stored column by column, type of its numbers or texts).

    Args:
        unpacked: a stream; afterwards its position is the first number.
        size: bytes available for the array.

    Raises:
        UnmovedError: no array, or one larger than ``size`` bytes; the message names ``where``.
    """
    if unpacked.read(6) != b"\x93NUMPY":  # numpy would return it as bytes
        raise UnmovedError(f"{where}: expected an array, came something else; save with numpy.savez")
    version = tuple(unpacked.read(2))
    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    if version not in readers:
        raise UnmovedError(f"{where}: expected numpy's format 1.0 or 2.0, came {version}; save with numpy.savez")
    shape, columns, dtype = readers[version](unpacked)
    if dtype.hasobject:
        raise UnmovedError(
            f"{where}: expected arrays of numbers, came an array of objects, which is a pickle and never loaded; "
            "save numbers with numpy.savez"
        )
    if dtype.kind not in "biufcSU" or not all(0 <= side < 2**63 for side in shape):
        raise UnmovedError(f"{where}: expected an array of numbers or texts, came {dtype!s:.80} of shape {shape!s:.80}")
    # An empty text has zero bytes, so that any number of them would fit.
    if math.prod(shape) * max(dtype.itemsize, 1) > size:
        raise UnmovedError(f"{where}: expected {size} bytes, came the shape {shape!s:.80}; save or copy it again")
    return shape, columns, dtype


def most_unpacked(packed: int) -> int:
    """Return how many bytes a compressed file of ``packed`` bytes may hold before it is taken for a bomb."""
    return max(ROOM, GROWTH * packed)


@contextmanager
def damage_explained(path: Path, kind: str, mend: str = "copy or download it again") -> Iterator[None]:
    """Turn any error of a library that reads a file into an `UnmovedError`.

    Args:
        kind: what the file should be, such as ``"tar archive"``.
        mend: what to do about it.
    """
    try:
        yield
    except UnmovedError:
        raise
    except Exception as error:
        if is_want_of_memory(error):
            raise UnmovedError(f"{path}: cannot be read at the moment (out of memory)") from error
        raise UnmovedError(f"{path}: expected a readable {kind}, came {brief(error)}; {mend}") from error


def brief(error: Exception) -> str:
    """Describe an error in one line of at most 200 characters: libraries may quote megabytes of a file."""
    text = str(error)
    return f"{type(error).__name__}: {text if len(text) <= 200 else text[:200] + ' ...'}"


def readable(name: str) -> str:
    """Convert a path or other string of the operating system to text: bytes that are not UTF-8 become ``\\xff``."""
    try:
        data = name.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:  # a surrogate that does not come from bytes
        data = name.encode("utf-8", "backslashreplace")
    return data.decode("utf-8", "backslashreplace")


def require_plain(value: object, where: str) -> None:
    """Raise `UnmovedError` where plain data is too deep, a number too large, a key not printable or a text no UTF-8."""
    waiting = [(value, 0)]
    while waiting:
        value, depth = waiting.pop()
        if depth > DEEPEST:
            raise UnmovedError(f"{where}: expected tables and lists at most {DEEPEST} deep, came more")
        if isinstance(value, Mapping):
            for key in value:
                if not isinstance(key, str) or not key.isprintable():
                    raise UnmovedError(f"{where}: expected keys of printable characters, came {key!r:.80}")
            waiting += [(part, depth + 1) for part in value.values()]
        elif isinstance(value, list | tuple):
            waiting += [(part, depth + 1) for part in value]
        elif isinstance(value, str) and _UNPAIRED.search(value):
            raise UnmovedError(
                f"{where}: expected text, came bytes that are no UTF-8: {value!r:.80}; give the file another name, or "
                "a link to it"
            )
        elif isinstance(value, int) and value not in WHOLE:
            raise UnmovedError(f"{where}: expected whole numbers of at most 64 bits, came one of {value.bit_length()}")
