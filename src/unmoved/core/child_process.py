"""Start Python processes that import nothing from the current folder and end with the process that started them."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from multiprocessing.connection import wait as wait_for

from unmoved.core.environment import variable

SAFE = "PYTHONSAFEPATH"  # the option -P, as processes inherit it


@contextmanager
def nothing_from_here() -> Iterator[None]:
    """Keep Python processes started inside the block from importing modules of the current folder.

    They are started as ``python -c``, which looks in the current folder before the standard library: a struct.py in
    that folder would run. multiprocessing then gives them the ``sys.path`` of this process.
    """
    with variable(SAFE, "1"):
        yield


@contextmanager
def out_of_reach_of_interrupts() -> Iterator[None]:
    """Start processes inside the block that Ctrl-C does not reach; this process has to end them.

    A terminal sends the interrupt to all of its processes. Each would print its own message, and lightning-fabric ends
    the first process when another ends before it. Processes inherit which signals are blocked; this process receives
    the interrupt after the block.
    """
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def end_with_parent(line: Connection | None = None) -> None:
    """End this process as soon as its parent has ended or was killed, instead of keeping its run locked.

    Args:
        line: one end of a pipe; also end this process when the other end is closed.
    """
    parent, number = multiprocessing.parent_process(), os.getppid()

    def watch() -> None:
        if parent is not None:
            wait_for([parent.sentinel, *([line] if line else [])])
        while parent is None and os.getppid() == number:  # a process that another library started
            time.sleep(1.0)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
