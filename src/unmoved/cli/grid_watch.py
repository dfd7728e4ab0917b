"""Watch the runs of a comparison from their folders: epochs trained, runs ended, and the time that is left."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from unmoved.experiments.jobs import Job

JUDGING = 0.3  # the share of a run's time that its attacks take, as a guess


class GridWatch:
    """How far the jobs of a comparison are, those that were done before it began included.

    Attributes:
        ended: the folders of the jobs that ended.
    """

    def __init__(self, jobs: Sequence[Job]) -> None:
        self.jobs, self.ended = jobs, set[str]()
        self._began, self._first = 0.0, self.share()

    def share(self) -> float:
        """Return the share of the work that is done, counting an epoch as much in each run."""
        done = sum(job.epochs if job.path in self.ended else (1 - JUDGING) * epochs_done(job) for job in self.jobs)
        return done / max(1, sum(job.epochs for job in self.jobs))

    def words(self) -> str:
        """Return ``"37 of 150 epochs, 2 of 10 runs, about 1 min left"``."""
        epochs, all_epochs = sum(map(epochs_done, self.jobs)), sum(job.epochs for job in self.jobs)
        words = f"{epochs} of {all_epochs} epochs, {len(self.ended)} of {len(self.jobs)} runs"
        share = self.share()
        if not self._began and share > self._first:  # what starting the processes takes says nothing about the rest
            self._began, self._first = time.monotonic(), share
        if not self._first < share < 1:
            return words
        left = (time.monotonic() - self._began) / (share - self._first) * (1 - share)
        return f"{words}, about {_duration(left)} left"


def epochs_done(job: Job) -> int:
    """Return how many epochs of a job are in its log: a torn last line is an epoch that is not done."""
    from unmoved.core import untrusted
    from unmoved.core.errors import UnmovedError

    try:
        return min(job.epochs, untrusted.content(Path(job.path) / "metrics.jsonl", 2**30).count(b"\n"))
    except (OSError, UnmovedError):
        return 0


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.0f} h"
