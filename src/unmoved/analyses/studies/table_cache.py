"""Cache tables that take long to make, each under a digest of everything that could change one of its values."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path

import pandas as pd

from unmoved.core import untrusted
from unmoved.core.errors import UnmovedError
from unmoved.core.files import write_atomic

MOST_TABLE = 2**28  # bytes


class TableCache:
    """Keep tables in a folder, each for one question: a question that differs, even by a digit, has another table.

    A file holds its question, its table and the digest of both: one that was torn or changed is not mistaken for an
    answer, its table is made again.

    Args:
        folder: made when the first table comes.

    Raises:
        UnmovedError: a folder that cannot be written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def table(self, name: str, question: Mapping[str, object], make: Callable[[], pd.DataFrame]) -> pd.DataFrame:
        """Return the table that answers the question; call ``make`` if there is none yet.

        Args:
            name: the file's name begins with it.
            question: whatever could change one value of the table, as JSON.
        """
        asked = json.dumps(question, sort_keys=True)
        path = self.folder / f"{name}-{hashlib.sha256(asked.encode()).hexdigest()[:16]}.json"
        table = _read(path, asked)
        if table is None:
            write_atomic(path, _text(make(), asked).encode())
            table = _read(path, asked)
        if table is None:
            raise UnmovedError(f"{path}: what was written cannot be read again; does something else write there?")
        return table


# JSON rather than CSV: Python writes and reads its floats to the last bit.
def _text(table: pd.DataFrame, asked: str) -> str:
    body = json.dumps({"question": asked, "table": table.to_dict("list")})
    return f"{body}\n{hashlib.sha256(body.encode()).hexdigest()}\n"


def _read(path: Path, asked: str) -> pd.DataFrame | None:
    try:
        body, digest, end = untrusted.content(path, MOST_TABLE).decode().split("\n")
    except (OSError, ValueError):  # a pipe, too: the table takes its place
        return None
    if end or digest != hashlib.sha256(body.encode()).hexdigest():
        return None
    try:  # the digest keeps out what was torn, not what was forged
        kept = json.loads(body)
        return pd.DataFrame(kept["table"]) if kept["question"] == asked else None
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None
