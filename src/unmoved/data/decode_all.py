"""Decode many images into one array, in threads, with a bounded number of them in memory at a time."""

from __future__ import annotations

import math
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import numpy as np

from unmoved.core.errors import UnmovedError
from unmoved.core.untrusted import content
from unmoved.data.decode import CorruptImage, Pixels, decode, known_formats, pillow_warnings
from unmoved.data.validation import LARGEST

R = TypeVar("R")
Progress = Callable[[int, int], None]
Item = tuple[int, str, Path | bytes]  # its position, its name, and its bytes or the path to them

CHUNK, CHUNK_BYTES = 64, 8 * 2**20


def decode_all(
    items: Iterable[Item], total: int, pixels: Pixels, *, skip_corrupt: bool, progress: Progress | None = None
) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Decode all images, of one size, in threads.

    Args:
        items: each of the positions 0..total-1 once, in any order.

    Returns:
        images: (n, C, H, W) uint8, in the order of their positions.
        kept: (n,) the positions of the images that could be read.
        skipped: the names of those that could not.

    Raises:
        UnmovedError: a corrupt image (unless skipped), two sizes, a decompression bomb; the file is named.
    """
    formats, room = known_formats(), _Room(total)
    good, skipped, done = np.zeros(total, dtype=bool), [], 0

    def work(chunk: list[Item]) -> list[tuple[int, str, str | None]]:
        return [(place, name, _attempt(place, name, data, pixels, formats, room)) for place, name, data in chunk]

    with pillow_warnings(), ThreadPoolExecutor(_workers()) as pool:
        try:
            for result in _in_order(pool, work, _chunks(items)):
                for place, name, error in result:
                    good[place] = error is None
                    if error is not None:
                        if not skip_corrupt:
                            raise UnmovedError(
                                f"{name}: expected a readable image, came corrupt or other data ({error}); remove or "
                                "replace the file, or set skip_corrupt = true to leave such files out"
                            )
                        skipped.append(name)
                done += len(result)
                if progress is not None:
                    progress(done, total)
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise
    if not good.all():
        room.images = room.images[good[: len(room.images)]]  # empty if no image was read
    return room.images, good.nonzero()[0], sorted(skipped)


class _Room:
    """Collect images as soon as they are decoded: no thread holds more than one, however large it is."""

    def __init__(self, total: int) -> None:
        self.images = np.empty((0, 1, 1, 1), np.uint8)
        self._total, self._first, self._lock = total, "", threading.Lock()

    def put(self, place: int, name: str, values: np.ndarray) -> None:
        with self._lock:
            if not self._first:
                self.images, self._first = _room(self._total, values, name), name
        if values.shape != self.images.shape[1:]:
            raise UnmovedError(
                f"expected images of one size, came {_sides(self.images[0])} in {self._first} and {_sides(values)} in "
                f"{name}; set size, for instance size = 32"
            )
        self.images[place] = values


def _attempt(place: int, name: str, data: Path | bytes, pixels: Pixels, formats: list[str], room: _Room) -> str | None:
    """Decode into ``room``; return an error as text, since an exception would keep the image in memory."""
    try:
        data = content(data, LARGEST) if isinstance(data, Path) else data
    except OSError as error:
        raise UnmovedError(f"{name}: expected a readable file, came {error}") from error
    try:
        values = decode(data, pixels, formats)
    except CorruptImage as error:
        return str(error)
    except UnmovedError as error:
        raise UnmovedError(f"{name}: {error}") from error
    room.put(place, name, values)
    return None


def _room(total: int, first: np.ndarray, name: str) -> np.ndarray:
    try:
        if total * first.size > _memory():  # many systems overcommit memory, and kill the process later
            raise MemoryError
        return np.empty((total, *first.shape), np.uint8)
    except MemoryError as error:
        raise UnmovedError(
            f"expected images that fit the memory, came {total} of {_sides(first)} as in {name}; set a smaller size"
        ) from error


def _memory() -> float:
    """Return the bytes of memory in the machine; infinite if it does not say."""
    try:
        return float(os.sysconf("SC_PAGE_SIZE")) * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return math.inf


def _sides(values: np.ndarray) -> str:
    return f"{values.shape[-2]} x {values.shape[-1]} (height x width)"


def _workers() -> int:
    affinity = getattr(os, "sched_getaffinity", None)
    return min(32, len(affinity(0)) if affinity is not None else os.cpu_count() or 1)


def _chunks(items: Iterable[Item]) -> Iterator[list[Item]]:
    """Group images, a few at a time: enough to hide a thread's overhead, too few to fill the memory."""
    chunk: list[Item] = []
    held = 0
    for item in items:
        chunk.append(item)
        held += len(item[2]) if isinstance(item[2], bytes) else 0
        if len(chunk) >= CHUNK or held >= CHUNK_BYTES:
            yield chunk
            chunk, held = [], 0
    if chunk:
        yield chunk


def _in_order(pool: ThreadPoolExecutor, work: Callable[[list[Item]], R], chunks: Iterator[list[Item]]) -> Iterator[R]:
    """Map over chunks with a bounded number of them in memory, so that slow decoding holds back the reader."""
    waiting: deque[Future[R]] = deque()
    for chunk in chunks:
        waiting.append(pool.submit(work, chunk))
        if len(waiting) > 2 * _workers():
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()
