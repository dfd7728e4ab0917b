"""Set malloc to keep the memory that a forward or backward pass frees, for the next pass to use."""

from __future__ import annotations

import functools

import torch

# The largest freed block that raises glibc's thresholds (DEFAULT_MMAP_THRESHOLD_MAX, 32 MiB), less its header.
_BLOCK = 31 * 2**20


@functools.cache
def keep_freed_memory() -> None:
    """Let glibc's malloc keep up to 62 MiB of freed memory at the top of its heap, instead of 256 KiB.

    A pass allocates and frees tens of megabytes. If they return to the system, the next pass gets new pages, which the
    system zeroes first; that takes up to a third of the time of a small network. glibc keeps up to twice the size of
    the largest block freed so far, counting blocks up to 32 MiB (mallopt(3), M_MMAP_THRESHOLD, dynamic threshold). So
    one such block is allocated and freed; it costs nothing, since it is never written to. Other C libraries ignore it.
    """
    torch.empty(_BLOCK, dtype=torch.uint8)
