"""Save and load the trainer's state with a checksum; the state before is kept, and no pickle is ever executed."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import pickle
from collections.abc import Iterator
from pathlib import Path
from time import monotonic
from typing import IO, BinaryIO, cast

import torch

from unmoved.core.errors import UnmovedError
from unmoved.core.files import replacing
from unmoved.core.untrusted import require_regular
from unmoved.training.state import SavedState

logger = logging.getLogger("unmoved")
NEWEST, PREVIOUS = "trainer.pt", "trainer.previous.pt"
_SEAL = b"\nunmoved sha256 "  # and 64 hexadecimal digits, at the end of the file: all that comes before is whole
_CHUNK = 1 << 20


class _Damaged(Exception):
    """Report that the file is not what was saved, or nothing that may be read."""


class _Hashed:
    """Write to a file and through a checksum at once, so that the state is never in memory a second time.

    What stops the writing, be it a full disk or an interruption, is kept and raised by `close`: torch would cover it
    with a complaint of its own archive writer.
    """

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.digest = file, hashlib.sha256()
        self.stopped: BaseException | None = None

    def write(self, data: bytes | memoryview) -> int:
        if self.stopped is None:
            try:
                self.digest.update(data)
                self.file.write(data)
            except BaseException as error:
                self.stopped = error
        return len(data)

    def flush(self) -> None:
        """Do nothing: `files.replacing` flushes once."""

    def close(self) -> None:
        if self.stopped is not None:
            raise self.stopped
        self.digest.update(_SEAL)
        self.file.write(_SEAL + self.digest.hexdigest().encode())


class Budget:
    """Decide when to save: as often as a share of the time allows, of training and saving together.

    Only when it is saved depends on the clock, never what: a training that is gone on with ends in the same bits from
    whatever epoch. A kill loses what was trained since, about (seconds of a save) / share.

    Args:
        share: in [0, 1]; 1 allows every epoch, 0 none.
        expected: seconds that the first save is thought to take; each later one, what the last one took.
        is_first: whether the run has nothing saved yet. Its first save is allowed whatever it costs (unless ``share``
            is 0), so that what cannot be saved is known now and not at the end; those after it make up for its time.
    """

    def __init__(self, share: float, expected: float, *, is_first: bool = False) -> None:
        self.share, self.expected, self.is_first = share, expected, is_first
        self.trained = self.spent = 0.0

    def allows(self, seconds: float) -> bool:
        """Return whether to save now, ``seconds`` of training after the last time that this was asked."""
        self.trained += seconds
        saving = self.spent + self.expected
        if self.is_first:
            self.is_first = False
            return self.share > 0
        return saving <= self.share * (self.trained + saving)

    @contextlib.contextmanager
    def spending(self) -> Iterator[None]:
        """Count the time of a save."""
        began = monotonic()
        yield
        self.expected = monotonic() - began
        self.spent += self.expected


def guessed(tensors: object) -> float:
    """Guess the seconds that saving these tensors takes on a disk of 200 MB/s; the first save measures it."""
    if isinstance(tensors, torch.Tensor):
        return tensors.nbytes / 200e6
    parts = tensors.values() if isinstance(tensors, dict) else tensors if isinstance(tensors, list | tuple) else ()
    return sum(map(guessed, parts))


def save(folder: Path, state: SavedState) -> None:
    """Replace the newest state, in one pass over it; it becomes the previous one.

    Raises:
        UnmovedError: as `files.write_atomic`.
    """
    # Checksum and state in one file: a kill cannot come between them. Readers of zip archives look for the archive's
    # end from the back and pass over the seal, so that torch.load opens the file as it is.
    with replacing(folder / NEWEST, previous=folder / PREVIOUS) as file:
        hashed = _Hashed(file)
        torch.save(state, cast(IO[bytes], hashed))
        hashed.close()


def load(folder: Path, *, mend: bool = False) -> SavedState | None:
    """Load the newest whole state, or None if nothing was saved; read with ``weights_only=True``: nothing in it is run.

    Args:
        mend: whether a damaged newest is removed where the one before is taken, and that is logged. Whoever saves next
            must do so: `save` would put the damaged one in the place of the whole one.

    Raises:
        UnmovedError: none of them is whole; or one cannot be read at the moment, which says nothing about what is in
            it: for want of memory or permission, or because the disk does not answer. Nothing is removed then.
    """
    problems: dict[str, _Damaged] = {}
    for name in (NEWEST, PREVIOUS):
        path = folder / name
        try:
            state = _read(path)
        except FileNotFoundError:  # the newest, too, for a moment: see `files.replacing`
            continue
        except _Damaged as error:
            problems[name] = error
            continue
        except (OSError, MemoryError, RuntimeError) as error:
            raise UnmovedError(
                f"{path}: the trainer's state cannot be read at the moment ({_cause(error)}), which does not mean that "
                "it is damaged: it was left as it is; see to that cause, then repeat the command"
            ) from error
        for damaged, problem in problems.items() if mend else ():
            logger.warning("%s is damaged (%s); going on from %s, the one before", folder / damaged, problem, name)
            (folder / damaged).unlink(missing_ok=True)
        return state
    if not problems:
        return None
    first, problem = next(iter(problems.items()))
    raise UnmovedError(
        f"{folder / first}: not a trainer state that can be read safely ({problem}); "
        f"delete {'it' if len(problems) == 1 else 'it and ' + PREVIOUS} to train this run from its start"
    ) from problem


def _read(path: Path) -> SavedState:
    """Read a state; raise `_Damaged` if it is not what `save` wrote, any other error if that cannot be known now."""
    require_regular(path, path.stat())
    with open(path, "rb") as file:
        _require_seal(file)
        file.seek(0)
        try:
            state: SavedState = torch.load(file, map_location="cpu", weights_only=True)
        except (pickle.UnpicklingError, EOFError, LookupError, TypeError, ValueError, AttributeError) as error:
            # Sealed, so it is what was saved; but `save` writes nothing that torch refuses.
            raise _Damaged(type(error).__name__) from error
    if not isinstance(state, dict) or not isinstance(state.get("log"), dict):
        raise _Damaged("of another version of unmoved")
    return state


def _require_seal(file: BinaryIO) -> None:
    """Read all of a file once, a piece at a time, and raise `_Damaged` unless it ends in its own checksum."""
    size = os.fstat(file.fileno()).st_size
    file.seek(max(size - 64 - len(_SEAL), 0))
    if file.read(len(_SEAL)) != _SEAL:  # before all of it is read: it may be anything, and of any length
        raise _Damaged("its checksum differs")
    file.seek(0)
    left, digest = size - 64, hashlib.sha256()
    while left > 0:
        piece = file.read(min(_CHUNK, left))
        if not piece:
            raise _Damaged("cut short")  # while it was read
        digest.update(piece)
        left -= len(piece)
    if file.read() != digest.hexdigest().encode():
        raise _Damaged("its checksum differs")


def _cause(error: Exception) -> str:
    """Return why a file cannot be read, in the words of the error."""
    if isinstance(error, OSError):
        return str(error.strerror or error)
    lines = str(error).strip().splitlines()
    return lines[0] if lines else "out of memory" if isinstance(error, MemoryError) else type(error).__name__
