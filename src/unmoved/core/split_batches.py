"""Iterate over a data split, checking each batch as it comes."""

from __future__ import annotations

from collections.abc import Iterator

from unmoved.core.batch import Batch, Index
from unmoved.core.errors import UnmovedError
from unmoved.core.protocols import Split


def one_pass(split: Split, size: int) -> Iterator[Batch]:
    """Iterate over all samples of a split in batches, in stored order.

    If a split yielded too few samples, the missing ones would not be attacked and robust accuracy would be too high.

    Raises:
        UnmovedError: something other than a `Batch`, or another number of samples than ``len(split)``.
    """
    total, seen = len(split), 0
    for batch in _batches(split.batches(size)):
        seen += len(batch)
        if seen > total:
            break
        yield batch
    if seen != total:
        kind = type(split).__name__
        raise UnmovedError(
            f"split: expected its {total} samples in each pass, came {seen}{' or more' * (seen > total)}; let "
            f"{kind}.batches begin anew whenever it is called, and yield as many samples as the length says"
        )


def one_epoch(split: Split, size: int, shuffle: int) -> Iterator[Batch]:
    """Iterate over the shuffled batches of an epoch: at most ceil(len(split) / size) of at most ``size`` samples.

    Raises:
        UnmovedError: something other than a `Batch`, a larger batch, or more batches, since the schedule counts steps.
    """
    most = -(-len(split) // size)
    for k, batch in enumerate(_batches(split.batches(size, shuffle=shuffle))):
        if len(batch) > size or k == most:
            came = f"a batch of {len(batch)}" if len(batch) > size else f"more than {most}"
            raise UnmovedError(
                f"split: expected at most {most} batches of at most {size} samples, came {came}; let "
                f"{type(split).__name__}.batches(size) yield size samples at a time"
            )
        yield batch


def _batches(batches: Iterator[Batch]) -> Iterator[Batch]:
    """Iterate over the batches that are not empty."""
    for batch in batches:
        if not isinstance(batch, Batch):
            raise UnmovedError(
                f"split: expected its batches to be Batch(x, y, index), came {type(batch).__name__}; "
                "yield unmoved.Batch from its batches(size)"
            )
        if len(batch):
            yield batch


def require_distinct(index: Index) -> None:
    """Raise `UnmovedError` if an identity occurs twice in ``index`` (B,)."""
    values, counts = index.unique(return_counts=True)
    if len(values) < len(index):
        raise UnmovedError(
            f"split: expected an identity of its own for each sample, came {int(values[counts > 1][0])} more than "
            "once; yield Batch(x, y, index) with the position of each sample in the data: without index, a batch "
            "numbers its samples from 0"
        )
