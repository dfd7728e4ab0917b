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
_SEAL = b"\nunmoved sha256 "  # then 64 hexadecimal digits: the checksum of everything before, at the end of the file
_CHUNK = 1 << 20


class _Damaged(Exception):
    """Report that the file is not as it was saved, or of a kind that is not read."""


class _Hashed:
    """Write to a file and through a checksum at once, so that the state is never in memory a second time.

    An error while writing, such as a full disk or an interruption, is stored and raised by `close`; otherwise torch
    would replace it by an error of its archive writer.
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
    """Decide when to save, so that saving takes at most a given share of the time of training and saving together.

    The clock decides only when a state is saved: a training ends in the same bits from whichever epoch it is resumed.
    If it is killed, the training since the last save is lost, about (seconds of a save) / share.

    Args:
        share: in [0, 1]; 1 allows every epoch, 0 none.
        expected: expected seconds of the first save; later ones are expected to take as long as the last.
        is_first: whether the run has nothing saved yet. The first save is then made whatever it takes (unless ``share``
            is 0), so that a state that cannot be saved is found early; later saves make up for its time.
    """

    def __init__(self, share: float, expected: float, *, is_first: bool = False) -> None:
        self.share, self.expected, self.is_first = share, expected, is_first
        self.trained = self.spent = 0.0

    def allows(self, seconds: float) -> bool:
        """Return whether to save now, after ``seconds`` of training since the last call."""
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
    # Checksum and state are in one file, so that they are replaced together. Readers of zip archives search the
    # archive's end from the back and skip the seal, so that torch.load opens the file as it is.
    with replacing(folder / NEWEST, previous=folder / PREVIOUS) as file:
        hashed = _Hashed(file)
        torch.save(state, cast(IO[bytes], hashed))
        hashed.close()


def load(folder: Path, *, mend: bool = False) -> SavedState | None:
    """Load the newest whole state, or None if nothing was saved; read with ``weights_only=True``: nothing in it is run.

    Args:
        mend: remove and log a damaged newest state when the one before is used. Needed before the next `save`, which
            would replace the intact state by the damaged one.

    Raises:
        UnmovedError: no state is intact; or one cannot be read at the moment, because of memory, permissions or the
            disk, so that nobody knows whether it is damaged. Nothing is removed then.
    """
    problems: dict[str, _Damaged] = {}
    for name in (NEWEST, PREVIOUS):
        path = folder / name
        try:
            state = _read(path)
        except FileNotFoundError:  # even the newest may be missing for a moment: see `files.replacing`
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
    """Read a state; raise `_Damaged` if it is not what `save` wrote, another error if it cannot be read now."""
    require_regular(path, path.stat())
    with open(path, "rb") as file:
        _require_seal(file)
        file.seek(0)
        try:
            state: SavedState = torch.load(file, map_location="cpu", weights_only=True)
        except (pickle.UnpicklingError, EOFError, LookupError, TypeError, ValueError, AttributeError) as error:
            # The checksum fits, but `save` writes nothing that torch refuses.
            raise _Damaged(type(error).__name__) from error
    if not isinstance(state, dict) or not isinstance(state.get("log"), dict):
        raise _Damaged("of another version of unmoved")
    return state


def _require_seal(file: BinaryIO) -> None:
    """Read all of a file once, a piece at a time, and raise `_Damaged` unless it ends in its own checksum."""
    size = os.fstat(file.fileno()).st_size
    file.seek(max(size - 64 - len(_SEAL), 0))
    if file.read(len(_SEAL)) != _SEAL:  # before the whole file is read, which may be anything, and of any length
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
