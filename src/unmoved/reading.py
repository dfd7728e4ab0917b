"""Files that anybody may have written -> plain data and arrays, within bounds: length, depth, size of a number, keys.

Parsers are written for honest files: a few hundred brackets end them, a long dotted key or a number of a million digits
keeps them busy for hours, a small archive fills the memory, and deep tables end whoever prints or copies them.
"""

from __future__ import annotations

import json
import tomllib
import zipfile
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from unmoved.errors import UnmovedError

LONGEST = 2**18  # characters of a TOML file; a recipe has two thousand
DOTS = 200  # in a line: tomllib's time grows with the square of a key's parts
DEEPEST = 32  # tables and lists inside each other
# What compressed files may grow to: far above what images and arrays do, far below what a bomb does (1000 times).
ROOM, GROWTH = 2**30, 100
WHOLE = range(-(2**63), 2**63)  # what TOML promises of an integer


def toml(text: str, where: str) -> dict[str, Any]:
    """The tables of a TOML text.

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


def json_object(text: str, where: str) -> dict[str, Any]:
    """The object of a JSON text.

    Raises:
        UnmovedError: no JSON, no object, or beyond the bounds; it names ``where``.
    """
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UnmovedError(f"{where}: not valid JSON ({str(error)[:300]}); the file was changed or torn") from error
    if not isinstance(value, dict):
        came = type(value).__name__
        raise UnmovedError(f"{where}: expected a JSON object, came a {came}; the file was changed or torn")
    require_plain(value, where)
    return value


def json_lines(text: str, where: str) -> list[dict[str, Any]]:
    """The objects of a text with one on each line.

    Raises:
        UnmovedError: as `json_object`; it names the line.
    """
    lines = text.removesuffix("\n").split("\n") if text else []
    return [json_object(line, f"{where}: line {number}") for number, line in enumerate(lines, start=1)]


def npz(path: Path, wanted: Collection[str] | None = None) -> dict[str, np.ndarray]:
    """The arrays of an .npz file, or those of them that are wanted.

    Raises:
        UnmovedError: no .npz file, a damaged one, a bomb, or one with objects, which are pickles and never loaded.
    """
    if not path.is_file():  # a pipe may never end
        raise UnmovedError(f"{path}: expected a regular file, came something else; correct the path")
    if not zipfile.is_zipfile(path):
        raise UnmovedError(
            f"{path}: expected an .npz file, came something else; save with numpy.savez(file, x=..., y=...)"
        )
    try:
        _require_no_bomb(path)
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as stored:
            found = {key: stored[key] for key in stored.files if wanted is None or key in wanted}
    except UnmovedError:
        raise
    except Exception as error:  # bytes of strangers: zipfile, zlib and numpy's header reader have errors of their own
        if "allow_pickle" in str(error):
            raise UnmovedError(
                f"{path}: expected arrays of numbers, came an array of objects, which is a pickle and never loaded; "
                "save numbers with numpy.savez"
            ) from error
        raise UnmovedError(
            f"{path}: expected a readable .npz file, came {brief(error)}; save or copy it again"
        ) from error
    for key, value in found.items():
        if not isinstance(value, np.ndarray):  # numpy hands out a member that is no array as bytes
            raise UnmovedError(f"{path}: expected an array {key!r}, came something else; save with numpy.savez")
    return found


def _require_no_bomb(path: Path) -> None:
    """numpy would fill the memory before anybody saw what is in it; zipfile never gives more than it announces here."""
    most = most_unpacked(path.stat().st_size)
    with zipfile.ZipFile(path) as archive:
        size = sum(member.file_size for member in archive.infolist())
    if size > most:
        raise UnmovedError(
            f"{path}: expected at most {most} bytes in a file of this size, came {size}; it may be a decompression "
            "bomb; if it is yours, save it with numpy.savez, which does not compress"
        )


def most_unpacked(packed: int) -> int:
    """How many bytes a compressed file of ``packed`` bytes may hold before it is taken for a bomb."""
    return max(ROOM, GROWTH * packed)


def brief(error: Exception) -> str:
    """What went wrong, in a line: what bytes of strangers make a library say may be megabytes."""
    words = str(error)
    return f"{type(error).__name__}: {words if len(words) <= 200 else words[:200] + ' ...'}"


def require_plain(value: Any, where: str) -> None:
    """Raise `UnmovedError` where plain data is deeper than 32, a number larger than 64 bits, or a key not printable."""
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
        elif isinstance(value, int) and value not in WHOLE:
            raise UnmovedError(f"{where}: expected whole numbers of at most 64 bits, came one of {value.bit_length()}")
