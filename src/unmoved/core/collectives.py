"""Compute sums, means and gathers over the processes that train one model, each with its rows of a batch.

Each process holds some rows of a batch; gradients are averaged over the processes (DDP). The result equals that of one
process with the whole batch if each mean is weighted by the number of samples (`mean`), and each quantity that couples
samples is computed over all of them (`logsumexp`, `gathered`, `summed`). Outside `sharing`, and in a single process,
these functions are the plain operations.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch import distributed as dist

from unmoved.core.batch import Batch, PerSample


@dataclass(frozen=True)
class Share:
    """Describe one process's rows of a batch: ``rank, rank + count, ...`` of ``total``, ``own`` of them.

    If a batch is smaller than the number of processes, some have no sample of their own (``own`` is 0): they compute
    on the first sample of the batch with weight zero.
    """

    rank: int
    count: int
    own: int
    total: int

    @staticmethod
    def of(batch: Batch, rank: int, count: int) -> tuple[Batch, Share | None]:
        """Return the rows of process ``rank`` of ``count`` and its share; all rows and None if there is one process."""
        if count == 1:
            return batch, None
        rows = torch.arange(len(batch), device=batch.y.device)[rank::count]
        share = Share(rank, count, len(rows), len(batch))
        return batch.take(rows if len(rows) else rows.new_zeros(1)), share


_current: Share | None = None


@contextmanager
def sharing(share: Share | None) -> Iterator[None]:
    """Mark a block in which this process works on its share of a batch, while all others do the same on theirs."""
    global _current
    before, _current = _current, share
    try:
        yield
    finally:
        _current = before


def mean(values: PerSample) -> Tensor:
    """Average a loss so that the mean of the results over all processes is the mean over all samples.

    ``(count / total) sum_i values_i`` over this process's own samples; one process alone: the mean.
    """
    if _current is None:
        return values.mean()
    return values[: _current.own].sum() * (_current.count / _current.total)


def logsumexp(values: PerSample) -> Tensor:
    """Compute ``log sum_i exp(values_i)`` over the rows of all processes.

    Its gradient is scaled by total / own. A term that adds this number to every sample then has the same gradient as
    in one process, both in the mean over all samples (training) and in the sum over own samples (an attack).
    """
    if _current is None:
        return torch.logsumexp(values, dim=0)
    own = values[: _current.own]
    if _current.own:
        own = own.detach() + (own - own.detach()) * (_current.total / _current.own)
    rows = _rows(own)
    rows[_current.rank] = own
    return torch.logsumexp(torch.cat(rows), dim=0)


def own(rows: Tensor) -> Tensor:
    """Return all rows, or none if this process has no sample of its own."""
    return rows if _current is None else rows[: _current.own]


def gathered(rows: Tensor) -> Tensor:
    """Gather the rows (B, ...) of all processes, without a gradient."""
    return rows.detach() if _current is None else torch.cat(_rows(rows[: _current.own]))


def summed(value: Tensor) -> Tensor:
    """Sum over all processes, without a gradient; each passes the sum over its own samples only."""
    if _current is None:
        return value.detach()
    total = value.detach().clone()
    dist.all_reduce(total)
    return total


def _rows(rows: Tensor) -> list[Tensor]:
    """Return the rows of each process, in the order of the ranks; their numbers may differ."""
    assert _current is not None
    size = -(-_current.total // _current.count)
    padded = rows.new_zeros(size, *rows.shape[1:])
    padded[: len(rows)] = rows.detach()
    parts = [torch.empty_like(padded) for _ in range(_current.count)]
    dist.all_gather(parts, padded)
    kept = [len(range(rank, _current.total, _current.count)) for rank in range(_current.count)]
    return [part[:n] for part, n in zip(parts, kept, strict=True)]


def average(tensors: list[Tensor]) -> None:
    """Replace each tensor by its mean over the processes, in one exchange; do nothing if there is one process."""
    if _current is None or not tensors:
        return
    flat = torch.cat([tensor.detach().flatten() for tensor in tensors])
    dist.all_reduce(flat)
    flat /= _current.count
    with torch.no_grad():
        for tensor, part in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
            tensor.copy_(part.reshape(tensor.shape))
