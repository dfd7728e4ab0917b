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

    They are started as ``python -c``, which looks in the current folder before the standard library: a struct.py that
    lies there would run. multiprocessing then hands them the ``sys.path`` of this process.
    """
    with variable(SAFE, "1"):
        yield


def is_started_by_first() -> bool:
    """Return whether the first process of a training has started this one, by fabric; torchrun ends its own."""
    return os.environ.get("LOCAL_RANK", "0") != "0" and "TORCHELASTIC_RUN_ID" not in os.environ


def leave_interrupts_to_parent() -> None:
    """Ignore Ctrl-C, which reaches all processes of a terminal: the one that started this process ends it.

    Otherwise each would say something of its own, and lightning-fabric ends the first when another ends before it.
    """
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.SIG_IGN)


def end_with_parent(line: Connection | None = None) -> None:
    """End this process as soon as its parent is gone, even if killed: it would go on alone and keep its run locked.

    Args:
        line: the end of a pipe; let this process end, too, when the other end is closed.
    """
    parent, number = multiprocessing.parent_process(), os.getppid()

    def watch() -> None:
        if parent is not None:
            wait_for([parent.sentinel, *([line] if line else [])])
        while parent is None and os.getppid() == number:  # a process that another library started
            time.sleep(1.0)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
