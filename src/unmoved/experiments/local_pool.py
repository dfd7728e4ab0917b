"""Run jobs in processes of this machine; a job whose process dies is tried once more, and no other job is affected."""

from __future__ import annotations

import multiprocessing
from collections import Counter, deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import Connection
from typing import TypeVar

from unmoved.core import messages
from unmoved.core.child_process import end_with_parent, nothing_from_here, out_of_reach_of_interrupts

JobT = TypeVar("JobT")
DEATHS = 2  # after this many deaths of its process a job is given up


class ProcessDied(Exception):
    """Report that the process of a job was killed from outside in every try."""


class JobError(Exception):
    """Report an unexpected error as text, since this process may be unable to import its type."""


def each(
    act: Callable[[JobT], object], jobs: Sequence[JobT], count: int, poll: Callable[[], None] | None = None
) -> Generator[tuple[int, BaseException | None]]:
    """Do the jobs in ``count`` processes; yield each one's number as it ends, with its error or None.

    Closed early or interrupted, it ends the jobs that still run.

    Args:
        act: a function of a module, called with a job in another process.
        poll: called a few times a second.
    """
    # One process per pool: a death breaks its whole pool, and does not tell which job caused it.
    pools = [_Pool() for _ in range(count)]
    waiting, deaths = deque(range(len(jobs))), Counter[int]()
    busy: dict[Future[object], tuple[int, int]] = {}
    is_done = False
    try:
        while waiting or busy:
            for slot in set(range(count)) - {slot for slot, _ in busy.values()}:
                if waiting:
                    number = waiting.popleft()
                    try:
                        future = pools[slot].submit(act, jobs[number])
                    except BrokenProcessPool:  # it died after its last job
                        pools[slot] = _Pool()
                        future = pools[slot].submit(act, jobs[number])
                    busy[future] = (slot, number)
            for future in wait(busy, timeout=0.3, return_when=FIRST_COMPLETED).done:
                slot, number = busy.pop(future)
                error = future.exception()
                if isinstance(error, BrokenProcessPool):
                    pools[slot].close()
                    pools[slot] = _Pool()
                    deaths[number] += 1
                    if deaths[number] < DEATHS:
                        waiting.append(number)  # after the others, when fewer jobs at a time need less memory
                        continue
                    error = ProcessDied()
                yield number, error
            if poll is not None:
                poll()
        is_done = True
    finally:
        for pool in pools:
            if (
                not is_done
            ):  # all of them, since an interruption may come between the start of a job and its record as busy
                pool.end()
            pool.close()


def _begin(line: Connection) -> None:
    """Prepare a process: end it with its parent, and show its log messages."""
    end_with_parent(line)
    messages.show()


class _Pool:
    """Run one job at a time in a process that ends with this one, or when told to."""

    def __init__(self) -> None:
        spawn = multiprocessing.get_context("spawn")
        with nothing_from_here():  # it starts multiprocessing's tracker of resources
            there, self._here = spawn.Pipe(duplex=False)
            self._pool = ProcessPoolExecutor(1, mp_context=spawn, initializer=_begin, initargs=(there,))

    def submit(self, act: Callable[[JobT], object], job: JobT) -> Future[object]:
        with nothing_from_here(), out_of_reach_of_interrupts():  # the first job starts the process
            return self._pool.submit(act, job)

    def end(self) -> None:
        """End the process, in the midst of its job."""
        self._here.close()

    def close(self) -> None:
        """Wait until the process has ended, after its job."""
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._here.close()
