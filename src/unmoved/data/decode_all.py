"""Many encoded images -> one array, in threads, with a bounded number of them under way."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import numpy as np

from unmoved.data.decode import CorruptImage, Pixels, decode, known_formats, pillow_warnings
from unmoved.errors import UnmovedError

R = TypeVar("R")
Progress = Callable[[int, int], None]
Item = tuple[int, str, Path | bytes]  # where it goes, its name, and its bytes or where they are

CHUNK, CHUNK_BYTES = 64, 8 * 2**20


def decode_all(
    items: Iterable[Item], total: int, pixels: Pixels, *, skip_corrupt: bool, progress: Progress | None = None
) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """All images of one size, decoded in threads.

    Args:
        items: each of the places 0..total-1 once, in any order.

    Returns:
        images: (n, C, H, W) uint8, in the order of their places.
        kept: (n,) the places that could be read.
        skipped: names of those that could not.

    Raises:
        UnmovedError: a corrupt image (unless skipped), two sizes, a decompression bomb; the file is named.
    """
    formats = known_formats()
    images, first = np.empty((0, 1, 1, 1), np.uint8), ""
    good, skipped, done = np.zeros(total, dtype=bool), [], 0

    def work(chunk: list[Item]) -> list[tuple[int, str, np.ndarray | CorruptImage]]:
        return [(place, name, _attempt(name, data, pixels, formats)) for place, name, data in chunk]

    with pillow_warnings(), ThreadPoolExecutor(_workers()) as pool:
        try:
            for result in _in_order(pool, work, _chunks(items)):
                for place, name, values in result:
                    if isinstance(values, CorruptImage):
                        if not skip_corrupt:
                            raise UnmovedError(
                                f"{name}: expected a readable image, came corrupt or other data ({values}); remove or "
                                "replace the file, or set skip_corrupt = true to leave such files out"
                            )
                        skipped.append(name)
                        continue
                    if not first:
                        images, first = _room(total, values, name), name
                    elif values.shape != images.shape[1:]:
                        raise UnmovedError(
                            f"expected images of one size, came {_sides(images[0])} in {first} and {_sides(values)} in "
                            f"{name}; set size, for instance size = 32"
                        )
                    images[place], good[place] = values, True
                done += len(result)
                if progress is not None:
                    progress(done, total)
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise
    return images if good.all() else images[good], good.nonzero()[0], sorted(skipped)


def _attempt(name: str, data: Path | bytes, pixels: Pixels, formats: list[str]) -> np.ndarray | CorruptImage:
    try:
        return decode(data.read_bytes() if isinstance(data, Path) else data, pixels, formats)
    except CorruptImage as error:
        return error
    except UnmovedError as error:
        raise UnmovedError(f"{name}: {error}") from error
    except OSError as error:
        raise UnmovedError(f"{name}: expected a readable file, came {error}") from error


def _room(total: int, first: np.ndarray, name: str) -> np.ndarray:
    try:
        return np.empty((total, *first.shape), np.uint8)
    except MemoryError as error:
        raise UnmovedError(
            f"expected images that fit the memory, came {total} of {_sides(first)} as in {name}; set a smaller size"
        ) from error


def _sides(values: np.ndarray) -> str:
    return f"{values.shape[-2]} x {values.shape[-1]} (height x width)"


def _workers() -> int:
    affinity = getattr(os, "sched_getaffinity", None)
    return min(32, len(affinity(0)) if affinity is not None else os.cpu_count() or 1)


def _chunks(items: Iterable[Item]) -> Iterator[list[Item]]:
    """A few images at a time: enough to hide a thread's overhead, too few to fill the memory."""
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
    """``map`` with a bounded number of chunks under way, so that slow decoding holds back the reader."""
    waiting: deque[Future[R]] = deque()
    for chunk in chunks:
        waiting.append(pool.submit(work, chunk))
        if len(waiting) > 2 * _workers():
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()
