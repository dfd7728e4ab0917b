"""Keep the memory that a pass over a network frees, for the next one."""

from __future__ import annotations

import functools

import torch

# The largest block of which glibc learns (DEFAULT_MMAP_THRESHOLD_MAX, 32 MiB), less what surrounds it.
_BLOCK = 31 * 2**20


@functools.cache
def keep_freed_memory() -> None:
    """Let the C library keep up to 62 MiB that are freed at the end of its heap, instead of 256 KiB.

    A pass takes and frees tens of megabytes. Where they go back to the system, the next pass gets them page by page,
    each one emptied first: up to a third of the time of a small network. glibc sets the limit to twice the largest
    block that was ever freed, up to 32 MiB (mallopt(3), M_MMAP_THRESHOLD, on the dynamic threshold), so one such block
    is taken, which costs nothing as it is never written to, and freed. Elsewhere this has no effect.
    """
    torch.empty(_BLOCK, dtype=torch.uint8)
