"""Read and write the tables of the study, which several processes write, and choose a setting by them."""

from __future__ import annotations

import csv
import gzip
import io
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pandas as pd
from study_methods import METHODS

from unmoved.core.errors import UnmovedError
from unmoved.core.files import write_atomic
from unmoved.runs import lock
from unmoved.runs.folder import folder_name

MARGIN = 0.01  # of clean accuracy that a setting may lie below the best


def outcomes_path(tables: Path, method: str, seed: int | str) -> Path:
    """Return where the table of a run's images is."""
    return tables / f"{folder_name(method)}-seed{seed}.csv.gz"


def read(path: Path) -> list[dict[str, str]]:
    """Return the rows of a table, none where there is no such file."""
    try:
        return list(csv.DictReader(io.StringIO(path.read_text(encoding="utf-8"))))
    except FileNotFoundError:
        return []


@contextmanager
def alone_if_free(folder: Path) -> Iterator[bool]:
    """Lock a folder inside the block unless somebody else has it; yield whether it is locked."""
    with ExitStack() as held:
        try:
            held.enter_context(lock.alone(folder))
            is_free = True
        except UnmovedError as error:
            if not isinstance(error.__cause__, BlockingIOError):
                raise
            is_free = False
        yield is_free


def record(path: Path, row: dict[str, object], keys: Sequence[str]) -> None:
    """Put a row into a table, in the place of one with the same keys; rows are in the order of the protocol."""
    new, order = {name: str(value) for name, value in row.items()}, list(METHODS)
    while True:
        with alone_if_free(path.parent) as is_free:
            if is_free:
                rows = [old for old in read(path) if any(old[key] != new[key] for key in keys)] + [new]
                rows.sort(key=lambda r: (int(r["seed"]), order.index(r["method"]) if r["method"] in order else -1))
                text = io.StringIO()
                writer = csv.DictWriter(text, list(new), restval="", extrasaction="ignore", lineterminator="\n")
                writer.writeheader()
                writer.writerows(rows)
                write_atomic(path, text.getvalue().encode())
                return
        time.sleep(0.2)


def zipped(table: pd.DataFrame) -> bytes:
    """Return the table as compressed CSV; the same table has the same bytes."""
    return gzip.compress(table.to_csv(index=False, lineterminator="\n").encode(), mtime=0)


def choice(rows: Sequence[dict[str, str]], values: Sequence[float]) -> float:
    """Return the value of the highest worst case, among those whose clean accuracy is at most a point below the best.

    Ties go to the first of the values, the default.

    Args:
        rows: of the table of tuning, one for each value, with counts of images.
    """
    tried = {float(row["value"]): row for row in rows}
    right = {value: int(tried[value]["clean"]) / int(tried[value]["n"]) for value in values}
    # Counts divided by one n differ by rounding alone where they are a point apart.
    fair = [value for value in values if right[value] >= max(right.values()) - MARGIN - 1e-9]
    return max(fair, key=lambda value: int(tried[value]["worst"]))
