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
    """Cache tables in a folder, each under a key: everything that could change one of its values.

    A file holds key, table and the digest of both. If it is damaged or was changed, the table is made again.

    Args:
        folder: made when the first table comes.

    Raises:
        UnmovedError: a folder that cannot be written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def table(self, name: str, key: Mapping[str, object], make: Callable[[], pd.DataFrame]) -> pd.DataFrame:
        """Return the table of this key; call ``make`` if it is not cached yet.

        Args:
            name: the file's name begins with it.
            key: everything that could change one value of the table, as JSON.
        """
        text = json.dumps(key, sort_keys=True)
        path = self.folder / f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:16]}.json"
        table = _read(path, text)
        if table is None:
            write_atomic(path, _text(make(), text).encode())
            table = _read(path, text)
        if table is None:
            raise UnmovedError(f"{path}: what was written cannot be read again; does something else write there?")
        return table


# JSON rather than CSV: Python writes and reads its floats to the last bit.
def _text(table: pd.DataFrame, key: str) -> str:
    body = json.dumps({"question": key, "table": table.to_dict("list")})
    return f"{body}\n{hashlib.sha256(body.encode()).hexdigest()}\n"


def _read(path: Path, key: str) -> pd.DataFrame | None:
    try:
        body, digest, end = untrusted.content(path, MOST_TABLE).decode().split("\n")
    except (OSError, ValueError):  # also a pipe, which the new table replaces
        return None
    if end or digest != hashlib.sha256(body.encode()).hexdigest():
        return None
    try:  # the digest detects damage, not forgery
        kept = json.loads(body)
        return pd.DataFrame(kept["table"]) if kept["question"] == key else None
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None
