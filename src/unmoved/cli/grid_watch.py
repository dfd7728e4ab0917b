"""Watch the runs of a comparison from their folders: epochs trained, runs ended, and the time that is left."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from unmoved.core.messages import duration

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
        self._began, self._first = 0.0, math.inf
        self._first, _ = self.look()

    def look(self) -> tuple[float, str]:
        """Return the share of the work that is done, counting an epoch as much in each run, and words for it.

        Such as ``"37 of 150 epochs, 2 of 10 runs, about 1 min 10 s left"``.
        """
        trained, epochs = [epochs_done(job) for job in self.jobs], sum(job.epochs for job in self.jobs)
        done = [
            job.epochs if job.path in self.ended else (1 - JUDGING) * n
            for job, n in zip(self.jobs, trained, strict=True)
        ]
        share = sum(done) / max(1, epochs)
        words = f"{sum(trained)} of {epochs} epochs, {len(self.ended)} of {len(self.jobs)} runs"
        if not self._began and share > self._first:  # what starting the processes takes says nothing about the rest
            self._began, self._first = time.monotonic(), share
        if not self._first < share < 1:
            return share, words
        left = (time.monotonic() - self._began) / (share - self._first) * (1 - share)
        return share, f"{words}, about {duration(10 * math.ceil(left / 10))} left"


def epochs_done(job: Job) -> int:
    """Return how many epochs of a job are in its log: a torn last line is an epoch that is not done."""
    from unmoved.core import untrusted
    from unmoved.core.errors import UnmovedError

    try:
        return min(job.epochs, untrusted.content(Path(job.path) / "metrics.jsonl", 2**30).count(b"\n"))
    except (OSError, UnmovedError):
        return 0
