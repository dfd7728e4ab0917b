"""Read pickles of plain containers and byte arrays without running anything they name.

The globals that the pickle of a numpy array needs are replaced by stand-ins that only record; any other is refused.
"""

from __future__ import annotations

import io
import math
import pickle
import pickletools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from unmoved.core.errors import UnmovedError
from unmoved.core.untrusted import brief


class StoredType:
    """Record what a pickle says of an array's element type."""

    def __init__(self, code: object = None, *_: object) -> None:
        self.code = code.decode("latin1") if isinstance(code, bytes) else code

    def __setstate__(self, _: object) -> None:
        """Ignore byte order and alignment, which mean nothing for bytes."""


class StoredArray:
    """Record what a pickle says of an array; `as_bytes` checks it."""

    def __init__(
        self, shape: object = None, kind: object = None, data: object = None, column_major: object = False
    ) -> None:
        self.shape, self.kind, self.data, self.column_major = shape, kind, data, column_major

    def __setstate__(self, state: tuple[object, ...]) -> None:
        _, self.shape, self.kind, self.column_major, self.data = state

    def as_bytes(self, name: str) -> np.ndarray:
        """Return the uint8 array it describes.

        Raises:
            UnmovedError: another element type, or content that does not fill the shape.
        """
        data = self.data.encode("latin1") if isinstance(self.data, str) else self.data
        sizes = self.shape if isinstance(self.shape, tuple) else ()
        code = self.kind.code if isinstance(self.kind, StoredType) else None
        is_shape = bool(sizes) and all(type(size) is int and size >= 0 for size in sizes)
        if code not in ("u1", "|u1") or not is_shape or not isinstance(data, bytes | bytearray):
            came = code if isinstance(code, str) else "another type"
            raise UnmovedError(f"{name}: expected an array of unsigned bytes, came {came}")
        if len(data) != math.prod(sizes):
            raise UnmovedError(f"{name}: expected {math.prod(sizes)} bytes for the shape {sizes}, came {len(data)}")
        return np.frombuffer(data, np.uint8).reshape(sizes, order="F" if self.column_major else "C")


@dataclass(frozen=True, slots=True)
class _StandIn:
    """Replace a global by an object that can at most be called, and that no pickle can change."""

    call: Callable[..., object] | None

    def __call__(self, *arguments: object) -> object:
        if self.call is None:
            raise pickle.UnpicklingError("it calls what is only a name")
        return self.call(*arguments)

    def __setstate__(self, _: object) -> None:
        raise pickle.UnpicklingError("it changes a global")


def _reconstruct(*_: object) -> StoredArray:
    return StoredArray()


def _frombuffer(data: object, kind: object, shape: object, order: object) -> StoredArray:
    return StoredArray(shape, kind, bytes(data) if isinstance(data, bytes | bytearray) else None, order == "F")


def _encode(text: object, _: object = None) -> bytes:
    """Stand for ``_codecs.encode``, with which Python 3 writes bytes into old pickles."""
    if not isinstance(text, str):
        raise pickle.UnpicklingError("it encodes what is no text")
    return text.encode("latin1")


_STAND_INS = {
    ("numpy", "ndarray"): _StandIn(None),  # only ever an argument of _reconstruct
    ("numpy", "dtype"): _StandIn(StoredType),
    ("_codecs", "encode"): _StandIn(_encode),
    **{(f"numpy.{core}.multiarray", "_reconstruct"): _StandIn(_reconstruct) for core in ("core", "_core")},
    **{(f"numpy.{core}.numeric", "_frombuffer"): _StandIn(_frombuffer) for core in ("core", "_core")},
}


# What Python 2 (protocol 2) and Python 3 (protocols 2 to 5) write for such content.
_OPCODE_NAMES = """
    PROTO FRAME STOP MARK NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1 BINFLOAT SHORT_BINSTRING BINSTRING
    SHORT_BINUNICODE BINUNICODE SHORT_BINBYTES BINBYTES BINBYTES8 BYTEARRAY8 EMPTY_LIST APPEND APPENDS EMPTY_DICT
    SETITEM SETITEMS EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 BINPUT LONG_BINPUT BINGET LONG_BINGET MEMOIZE GLOBAL
    STACK_GLOBAL REDUCE BUILD
"""
OPCODES = frozenset(_OPCODE_NAMES.split())


# The files in use have 50,000 opcodes, and at most one tuple for each of 10,000 texts.
MOST_OPCODES, MOST_TUPLES, LONGEST_REPEATED = 1_000_000, 25_000, 256
_KEEP, _RECALL = {"BINPUT", "LONG_BINPUT", "MEMOIZE"}, {"BINGET", "LONG_BINGET"}
# After these the object on top of the stack may be a tuple, or is unknown.
_MAY_BE_TUPLE = {"TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "EMPTY_TUPLE", "MARK"}
_MAY_BE_TUPLE |= {"APPEND", "APPENDS", "SETITEM", "SETITEMS", "BUILD"}


def _check_opcodes(data: bytes) -> None:
    """Refuse other opcodes, and lengths beyond the data, for which the unpickler would allocate memory.

    A few bytes may also describe objects that take unlimited time: a dictionary key of tuples of tuples, each repeated
    twice, never ends to hash; deep ones crash the process; a long text may be copied again and again.
    """
    may_repeat: dict[int, bool] = {}  # memo number -> whether its object may be repeated
    small, tuples = False, 0
    for number, (opcode, argument, _) in enumerate(pickletools.genops(data)):
        name = opcode.name
        tuples += name.startswith("TUPLE")
        if name not in OPCODES:
            raise pickle.UnpicklingError(f"it uses the opcode {name}")
        if number == MOST_OPCODES or tuples > MOST_TUPLES:
            raise pickle.UnpicklingError("it is too long")
        if name == "LONG_BINPUT" and int(argument or 0) > len(data):
            raise pickle.UnpicklingError(f"it remembers {argument} things")
        if name in _KEEP:
            may_repeat[len(may_repeat) if name == "MEMOIZE" else int(argument or 0)] = small
        elif name in _RECALL:
            if not may_repeat.get(int(argument or 0), True):
                raise pickle.UnpicklingError("it repeats a tuple or a long text")
            small = True
        elif name not in ("PROTO", "FRAME"):
            long = isinstance(argument, str | bytes | bytearray) and len(argument) > LONGEST_REPEATED
            small = name not in _MAY_BE_TUPLE and not long


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> _StandIn:
        if (module, name) not in _STAND_INS:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return _STAND_INS[module, name]


def loads(data: bytes, name: str) -> object:
    """Load what a pickle describes, with every array as a `StoredArray`; texts of Python 2 come as bytes.

    Raises:
        UnmovedError: the pickle is damaged, or asks for anything but arrays and plain containers.
    """
    try:
        _check_opcodes(data)
        return _Unpickler(io.BytesIO(data), encoding="bytes").load()
    except Exception as error:  # hostile bytes can make the unpickler raise nearly anything, but run nothing
        raise UnmovedError(
            f"{name}: expected a pickle of arrays and plain containers, came one that was refused "
            f"({brief(error)}); download the official file again"
        ) from error
