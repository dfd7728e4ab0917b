"""Jobs in processes of their own: one that dies takes only its own job with it, and that gets a second chance."""

from __future__ import annotations

import multiprocessing
import os
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

JobT = TypeVar("JobT")
DEATHS = 2  # of a job's process, and it is given up


class ProcessDied(Exception):
    """The process of a job was ended from outside, each time that it was tried."""


def each(
    act: Callable[[JobT], object], jobs: Sequence[JobT], count: int, poll: Callable[[], None] | None = None
) -> Generator[tuple[int, BaseException | None]]:
    """Do the jobs in ``count`` processes; yield each one's number as it ends, with its error or None.

    Args:
        act: a function of a module, called with a job in another process.
        poll: called a few times a second.
    """
    # One process a pool: a death breaks its whole pool and does not say which of its jobs was to blame.
    pools = [_pool() for _ in range(count)]
    waiting, deaths = deque(range(len(jobs))), Counter[int]()
    busy: dict[Future[object], tuple[int, int]] = {}
    try:
        while waiting or busy:
            for slot in set(range(count)) - {slot for slot, _ in busy.values()}:
                if waiting:
                    number = waiting.popleft()
                    try:
                        future = pools[slot].submit(act, jobs[number])
                    except BrokenProcessPool:  # it died after its last job
                        pools[slot] = _pool()
                        future = pools[slot].submit(act, jobs[number])
                    busy[future] = (slot, number)
            for future in wait(busy, timeout=0.3, return_when=FIRST_COMPLETED).done:
                slot, number = busy.pop(future)
                error = future.exception()
                if isinstance(error, BrokenProcessPool):
                    pools[slot].shutdown(wait=True)
                    pools[slot] = _pool()
                    deaths[number] += 1
                    if deaths[number] < DEATHS:
                        waiting.append(number)  # behind the others: fewer at a time need less memory
                        continue
                    error = ProcessDied()
                yield number, error
            if poll is not None:
                poll()
    finally:
        for pool in pools:
            pool.shutdown(wait=True, cancel_futures=True)


def _pool() -> ProcessPoolExecutor:
    spawn = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(1, mp_context=spawn, initializer=end_with_parent)


def end_with_parent() -> None:
    """Let this process end as soon as its parent is gone, killed too: it would go on alone, and keep its run locked."""
    parent, number = multiprocessing.parent_process(), os.getppid()

    def watch() -> None:
        if parent is not None:
            parent.join()
        while parent is None and os.getppid() == number:  # a process that another library started
            time.sleep(1.0)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
