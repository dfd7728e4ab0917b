"""What the fuzz tests share: mutations of valid files, and an eye on what is done while they are read."""

from __future__ import annotations

import copy
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

ROOT = Path(__file__).resolve().parents[2]

# --- what nobody may do while a file is read

FORBIDDEN = (
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "os.fork",
    "subprocess.Popen",
    "socket.connect",
    "exec",
    "ctypes.dlopen",
)
CHANGES = (
    "os.mkdir",
    "os.rename",
    "os.remove",
    "os.rmdir",
    "os.chmod",
    "os.link",
    "os.symlink",
    "os.truncate",
    "shutil.rmtree",
)
_inside: list[Path] = []
_crimes: list[str] = []


def _watch(event: str, arguments: tuple[Any, ...]) -> None:
    if not _inside:
        return
    if event in FORBIDDEN and not (event == "exec" and _is_ours(arguments[0])):
        _crimes.append(f"{event} {arguments!r:.300}")
    writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
    if (writes or event in CHANGES) and isinstance(arguments[0], str | bytes | os.PathLike):
        path = Path(os.fsdecode(arguments[0])).absolute()
        if not path.is_relative_to(_inside[0]) and path != Path(os.devnull):
            _crimes.append(f"{event} {path}")


def _is_ours(code: Any) -> bool:
    """Modules of installed packages are imported when they are first needed, and dataclasses run what they write."""
    return getattr(code, "co_filename", "").startswith(
        (sys.prefix, sys.base_prefix, "<frozen", "<string>", str(ROOT / "src"))
    )


sys.addaudithook(_watch)


@contextmanager
def watched(folder: Path) -> Iterator[None]:
    _inside.append(folder.absolute())
    try:
        yield
    finally:
        _inside.pop()
    assert _crimes == []


# --- mutations

KINDS = ("set", "flip", "cut", "insert", "repeat", "number", "swap")
Edits = list[tuple[str, int, bytes]]


def edits_of(drawn: bytes) -> Edits:
    """Up to five edits from bytes: hypothesis draws these much faster than it draws lists of tuples."""
    edits: Edits = []
    while len(drawn) >= 4 and len(edits) < 5:
        length = drawn[3] % 13
        edits.append((KINDS[drawn[0] % len(KINDS)], int.from_bytes(drawn[1:4], "big"), drawn[4 : 4 + length]))
        drawn = drawn[4 + length :]
    return edits


EDITS = st.binary(min_size=4, max_size=40).map(edits_of)
NUMBERS = [0, 1, 2**7, 2**8 - 1, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**63, 2**64 - 1]


def mutated(whole: bytes, edits: Edits) -> bytes:
    """The bytes after a few edits; a place is taken modulo what is there."""
    raw = bytearray(whole)
    for kind, number, piece in edits:
        place = number % (len(raw) + 1)
        if kind == "set":
            raw[place : place + len(piece)] = piece
        elif kind == "flip" and place < len(raw):
            raw[place] ^= 1 << (number % 8)
        elif kind == "cut":
            del raw[place : place + 1 + len(piece) ** 2]
        elif kind == "insert":
            raw[place:place] = piece
        elif kind == "repeat":
            raw[place:place] = raw[place : place + 1 + len(piece) ** 2] * (1 + number % 3)
        elif kind == "number":
            value, size = NUMBERS[number % len(NUMBERS)], (1, 2, 4, 8)[len(piece) % 4]
            raw[place : place + size] = (value % 256**size).to_bytes(size, ("big", "little")[number % 2])
        elif kind == "swap":
            other = (number // 7) % (len(raw) + 1)
            a, b = sorted((place, other))
            raw[:] = raw[:a] + raw[b:] + raw[a:b]
    return bytes(raw)


LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.sampled_from([0, -1, 1, 2**31, 2**63 - 1, 2**63, -(2**63)]),
    st.floats(),
    st.sampled_from([float("nan"), float("inf"), -0.0, 1e308, 5e-324, 8 / 255]),
    st.text(max_size=8),
    st.sampled_from(
        [
            "",
            "8/255",
            "1e400",
            "1e9999999",
            "1/0",
            "inf",
            "nan",
            "none",
            "pgd",
            "kl",
            "ce",
            "awp",
            "os:system",
            "a..b:c",
            "builtins:eval",
            "__main__:x",
            ".x:y",
            "os:path.join",
            "\x1b[2J",
            "\u202e",
            "..",
            "../x",
            "\x00",
            "x" * 5000,
        ]
    ),
    st.recursive(
        st.integers(0, 3), lambda part: st.lists(part, max_size=3) | st.dictionaries(st.text(max_size=4), part)
    ),
    st.integers(0, 60).map(lambda depth: nested(depth)),
)


def nested(depth: int) -> Any:
    value: Any = 1
    for k in range(depth):
        value = [value] if k % 2 else {"a": value}
    return value


def places(tables: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where a value stands in plain data."""
    found: list[tuple[Any, ...]] = [path] if path else []
    items = tables.items() if isinstance(tables, dict) else enumerate(tables) if isinstance(tables, list) else ()
    return found + [place for key, value in items for place in places(value, (*path, key))]


PLACE = st.integers(0, 10**6)
TABLE_EDITS = st.lists(
    st.one_of(
        st.tuples(st.just("near"), PLACE, PLACE),
        st.tuples(st.just("near"), PLACE, PLACE),
        st.tuples(st.just("set"), PLACE, LEAVES),
        st.tuples(st.sampled_from(("delete", "rename", "copy")), PLACE, st.text(max_size=6)),
    ),
    min_size=1,
    max_size=2,
)
# A value of the same kind gets past the first checks.
NEAR_NUMBERS = [0, 1, 2, 3, 7, 100, 2**31, 2**62, -1, 0.5, 0.1, 0.25, 1e-3, 1e308, 1e-320, 0.0, -0.5]
NEAR_TEXTS = [
    "pgd",
    "apgd",
    "fgsm",
    "square",
    "fab",
    "ce",
    "kl",
    "trades",
    "mart",
    "awp",
    "sam",
    "apd",
    "plain",
    "linf",
]
NEAR_TEXTS += [
    "l2",
    "l1",
    "adv",
    "clean",
    "best",
    "last",
    "crop",
    "flip",
    "none",
    "auto",
    "bf16",
    "cosine",
    "sgd",
    "1/3",
]


def near(value: Any, number: int) -> Any:
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return NEAR_NUMBERS[number % len(NEAR_NUMBERS)]
    if isinstance(value, str):
        return NEAR_TEXTS[number % len(NEAR_TEXTS)]
    return value


def mutated_tables(whole: Any, edits: list[tuple[str, int, Any]]) -> Any:
    tables = copy.deepcopy(whole)
    for kind, number, what in edits:
        there = places(tables)
        if not there:
            continue
        *parents, last = there[number % len(there)]
        target = tables
        for key in parents:
            target = target[key]
        if kind == "near":
            target[last] = near(target[last], what)
        elif kind == "set" or isinstance(target, list):
            target[last] = what
        elif kind == "delete":
            del target[last]
        elif kind == "rename":
            target[what] = target.pop(last)
        else:
            target[what] = copy.deepcopy(target[last])
    return tables
