"""Show what the package logs: a handler for ``logging.getLogger("unmoved")`` that writes one sentence a line.

The package logs what is worth knowing and needs no action, such as a damaged file that was repaired. A program that
imports the package configures these messages with ``logging``; the command and its processes show them with `shown`.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

logger = logging.getLogger("unmoved")
MOST_WORDS = 5000  # characters of a message


def printable(words: str) -> str:
    """Escape control characters and shorten long texts, since a message may hold names from untrusted files."""
    words = words if len(words) <= MOST_WORDS else words[:MOST_WORDS] + " ..."
    return "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in words)


def to_stderr(words: str) -> None:
    """Write one line to standard error."""
    sys.stderr.write(printable(words) + "\n")


def duration(seconds: float) -> str:
    """Return a time as people write it: ``"9.4 s"``, ``"1 min 15 s"``, ``"2 h 01 min"``."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s" if whole >= 10 else f"{seconds:.1f} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


class Notes(logging.Handler):
    """Hand each record to ``say`` as ``note: ...``."""

    def __init__(self, say: Callable[[str], None] = to_stderr) -> None:
        super().__init__(logging.INFO)
        self.say = say

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self.say(f"note: {record.getMessage()}")
        except Exception:  # a closed pipe must not end a training
            self.handleError(record)


def show(say: Callable[[str], None] = to_stderr) -> Notes:
    """Show what is logged from now on, from level INFO on, by ``say``."""
    handler = Notes(say)
    logger.addHandler(handler)
    logger.setLevel(handler.level)
    return handler


@contextmanager
def shown(say: Callable[[str], None] = to_stderr) -> Iterator[None]:
    """Show what is logged inside, as `show`; afterwards the log is as it was before."""
    level, handler = logger.level, show(say)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
