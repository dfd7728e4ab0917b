"""Attack in several threads at a time on a CPU, each with its own copy of the model and one core."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import suppress
from queue import SimpleQueue
from types import TracebackType
from typing import TypeVar

import torch
from torch import nn

Item = TypeVar("Item")
Result = TypeVar("Result")


class Workers:
    """``with Workers(model, count) as pool: pool.map(job, items)`` calls ``job(a copy of the model, item)``.

    Small networks gain more from several batches in parallel than from several threads in one convolution. With one
    worker, on a GPU, or for a model that cannot be copied, the jobs run one after the other on the model itself.

    Args:
        model: the model.
        count: threads; 0 for as many as torch uses.
    """

    def __init__(self, model: nn.Module, count: int) -> None:
        self._model, self._threads = model, torch.get_num_threads()
        self.count = (count or self._threads) if _on_cpu(model) else 1
        self._copies: SimpleQueue[nn.Module] = SimpleQueue()
        self._pool: ThreadPoolExecutor | None = None
        self._is_over = False

    def __enter__(self) -> Workers:
        if self.count > 1:
            try:
                copies = [copy.deepcopy(self._model) for _ in range(self.count)]
            except Exception:  # a user's model may hold something that cannot be copied
                self.count = 1
                return self
            for each in copies:
                with suppress(RuntimeError):  # a scripted model takes no hooks, and stops after the current item
                    each.register_forward_pre_hook(self._require_use)
                self._copies.put(each)
            torch.set_num_threads(1)
            self._pool = ThreadPoolExecutor(self.count)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._is_over = kind is not None
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
            torch.set_num_threads(self._threads)

    def map(self, job: Callable[[nn.Module, Item], Result], items: Iterable[Item]) -> Iterator[tuple[Item, Result]]:
        """Iterate over items with their results, in order; few items are read ahead."""
        if self._pool is None:
            for item in items:
                yield item, job(self._model, item)
            return
        running: deque[tuple[Item, Future[Result]]] = deque()
        for item in items:
            running.append((item, self._pool.submit(self._with_a_copy, job, item)))
            if len(running) > self.count:
                first, future = running.popleft()
                yield first, future.result()
        for first, future in running:
            yield first, future.result()

    def _require_use(self, model: nn.Module, inputs: object) -> None:
        """Stop before the next pass once interrupted, rather than after the whole attack."""
        if self._is_over:
            raise CancelledError

    def _with_a_copy(self, job: Callable[[nn.Module, Item], Result], item: Item) -> Result:
        model = self._copies.get()
        try:
            return job(model, item)
        finally:
            self._copies.put(model)


def _on_cpu(model: nn.Module) -> bool:
    return all(tensor.device.type == "cpu" for tensor in (*model.parameters(), *model.buffers()))
