"""Tables that took long to make, kept under the question that they answer: what is there is not made again."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd

from unmoved.disk import write_atomic
from unmoved.errors import UnmovedError


class Shelf:
    """A folder of tables. A table belongs to one question; another question, even by a digit, has another table.

    A file's first line is its question and its last the number of rows, so that a file which was torn, or put there by
    somebody else, is not mistaken for an answer.

    Args:
        folder: made when the first table comes.

    Raises:
        UnmovedError: a folder that cannot be written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def table(self, name: str, question: dict[str, Any], make: Callable[[], pd.DataFrame]) -> pd.DataFrame:
        """The table that answers the question; ``make`` is called where there is none yet.

        Args:
            name: the file's name begins with it.
            question: whatever could change one value of the table, as JSON.
        """
        head = "# " + json.dumps(question, sort_keys=True)
        path = self.folder / f"{name}-{hashlib.sha256(head.encode()).hexdigest()[:16]}.csv"
        found = _read(path, head)
        if found is None:
            write_atomic(path, _text(make(), head).encode())
            found = _read(path, head)
        if found is None:
            raise UnmovedError(
                f"{path}: what was written cannot be read again; see whether something else writes there"
            )
        return found


def _text(table: pd.DataFrame, head: str) -> str:
    return f"{head}\n{table.to_csv(index=False)}# {len(table)} rows\n"


def _read(path: Path, head: str) -> pd.DataFrame | None:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return None
    first, _, rest = text.partition("\n")
    body, _, last = rest.removesuffix("\n").rpartition("\n")
    if first != head or not last.startswith("# "):
        return None
    try:
        table = pd.read_csv(io.StringIO(body), float_precision="round_trip")
    except (ValueError, pd.errors.ParserError):
        return None
    return table if last == f"# {len(table)} rows" else None
