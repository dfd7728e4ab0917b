"""Do jobs in processes of this machine; a process that dies costs its own job a second try, and no other anything."""

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
DEATHS = 2  # of a job's process, and it is given up


class ProcessDied(Exception):
    """Report that the process of a job was ended from outside, each time that it was tried."""


class JobError(Exception):
    """Report an unexpected error in words: its type may be one that this process cannot import."""


def each(
    act: Callable[[JobT], object], jobs: Sequence[JobT], count: int, poll: Callable[[], None] | None = None
) -> Generator[tuple[int, BaseException | None]]:
    """Do the jobs in ``count`` processes; yield each one's number as it ends, with its error or None.

    Left early, or interrupted, it ends the jobs that still run.

    Args:
        act: a function of a module, called with a job in another process.
        poll: called a few times a second.
    """
    # One process a pool: a death breaks its whole pool and does not say which of its jobs was to blame.
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
                        waiting.append(number)  # behind the others: fewer at a time need less memory
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
            ):  # each, for an interruption may come between the start of a job and the note that it is busy
                pool.end()
            pool.close()


def _begin(line: Connection) -> None:
    """Prepare a process: it ends with its parent, and shows what is logged in it."""
    end_with_parent(line)
    messages.show()


class _Pool:
    """Run one job at a time in a process, which ends when this one does or says so."""

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
