"""The trainer's state on disk: sealed with a checksum, the one before it kept, and no pickle ever executed."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from unmoved.disk import write_atomic
from unmoved.errors import UnmovedError

NEWEST, PREVIOUS = "trainer.pt", "trainer.previous.pt"
_SEAL = b"\nunmoved sha256 "  # and 64 hexadecimal digits, at the end of the file: all that comes before is whole


def silent(words: str) -> None:
    """For those who do not want to be told."""


def save(folder: Path, state: dict[str, Any]) -> None:
    """Replace the newest state; it becomes the previous one.

    Raises:
        UnmovedError: as `disk.write_atomic`.
    """
    buffer = io.BytesIO()
    torch.save(state, buffer)
    # Checksum and state in one file: a kill cannot come between them. Readers of zip archives look for the archive's
    # end from the back and pass over the seal, so that torch.load opens the file as it is.
    data = buffer.getvalue() + _SEAL
    sealed = data + hashlib.sha256(data).hexdigest().encode()
    write_atomic(folder / NEWEST, sealed, previous=folder / PREVIOUS)


def load(folder: Path, tell: Callable[[str], None] = silent, *, mend: bool = False) -> dict[str, Any] | None:
    """The newest whole state, or None where nothing was saved; read with ``weights_only=True``: nothing in it is run.

    Args:
        tell: called with a sentence where the newest is damaged and the one before is taken.
        mend: whether a damaged newest is then removed, as whoever saves next must do: `save` would put it in the place
            of the whole one before.

    Raises:
        UnmovedError: none of them is whole.
    """
    problems: dict[str, Exception] = {}
    for name in (NEWEST, PREVIOUS):
        path = folder / name
        if not path.exists():  # the newest, too, for a moment: see `disk.write_atomic`
            continue
        try:
            state = _unsealed(path.read_bytes())
        except Exception as error:  # damaged bytes make torch raise almost anything
            problems[name] = error
            continue
        for damaged, problem in problems.items():
            tell(f"{folder / damaged} is damaged ({_brief(problem)}); going on from {name}, the epoch before")
            if mend:
                (folder / damaged).unlink(missing_ok=True)
        return state
    if not problems:
        return None
    first, problem = next(iter(problems.items()))
    raise UnmovedError(
        f"{folder / first}: not a trainer state that can be read safely ({_brief(problem)}); "
        f"delete {'it' if len(problems) == 1 else 'it and ' + PREVIOUS} to train this run from its start"
    ) from problem


def _unsealed(data: bytes) -> dict[str, Any]:
    """A state from its bytes; older versions did not seal theirs, which are taken as they are."""
    body, seal, digest = data.rpartition(_SEAL)
    if seal and hashlib.sha256(body + seal).hexdigest().encode() != digest:
        raise UnmovedError("its checksum differs")
    state = dict(torch.load(io.BytesIO(body if seal else data), map_location="cpu", weights_only=True))
    if not isinstance(state["log"], list):
        raise TypeError("no log")
    return state


def _brief(error: Exception) -> str:
    return str(error) if isinstance(error, UnmovedError) else type(error).__name__
