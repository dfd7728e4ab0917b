"""Hold what `unmoved.judge` found about a model, and show it in a terminal and in a notebook."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from html import escape
from pathlib import Path

import pandas as pd

from unmoved.evaluation import outcomes
from unmoved.evaluation.estimate import Estimate
from unmoved.reports import report as reports
from unmoved.runs.folder import Run
from unmoved.runs.records import Doctor


@dataclass(frozen=True, eq=False)
class Judgement:
    """Hold what was found about a model: shown as a table, read by its attributes.

    Attributes:
        run: the run folder that holds all of it; gone with this object unless a folder was asked for.
        outcomes: one row for each image and attack, with the columns of `unmoved.outcomes`.
        notes: conversions of data or model before the evaluation.
        doctor: the doctor's sentence and findings; None if it was not run.
        estimate: what AutoAttack leaves, estimated from a sample; None without a sample. With one, ``outcomes``
            and ``summary`` are the cheap attack's, which was run on all images.
    """

    run: Run
    outcomes: pd.DataFrame
    notes: tuple[str, ...] = ()
    doctor: Doctor | None = None
    estimate: Estimate | None = None

    @cached_property
    def summary(self) -> pd.DataFrame:
        """Return accuracy, its 95 % interval (low, high) and n by measure: clean, each attack, the worst case."""
        return outcomes.summary(self.outcomes).set_index("measure")

    @property
    def clean(self) -> float:
        """Return the share of images that the model gets right as they are."""
        return self._of(outcomes.CLEAN, "accuracy")

    @property
    def accuracy(self) -> float:
        """Return the share that it gets right after every attack, an upper bound on its robust accuracy.

        If AutoAttack was run on a sample, an estimate of that: quote it with `interval`.
        """
        if self.estimate is not None:
            return self.estimate.left / self.estimate.n
        return self._of(outcomes.WORST, "accuracy")

    @property
    def interval(self) -> tuple[float, float]:
        """Return the 95 % interval of `accuracy` for all images like these: Wilson's, or `Estimate.population`."""
        if self.estimate is not None:
            return self.estimate.population
        return self._of(outcomes.WORST, "low"), self._of(outcomes.WORST, "high")

    def _of(self, measure: str, column: str) -> float:
        return float(self.summary[column].to_dict()[measure])

    def report(self, path: Path | str = "report.html", title: str = "Robustness report") -> Path:
        """Write one self-contained HTML page, and its figures beside it; return its path."""
        return reports.write([self.run], Path(path), title=title)

    def _rows(self) -> pd.DataFrame:
        """Return the rows to show: for a sample without the worst case, which would be the cheap attack's."""
        return self.summary if self.estimate is None else self.summary.drop(index=outcomes.WORST)

    def _words(self) -> list[str]:
        words = [] if self.doctor is None else [f"doctor: {self.doctor['sentence'] or 'no objection'}"]
        return [*words, *(f"note: {note}" for note in self.notes)]

    def __repr__(self) -> str:
        low, high = (100 * end for end in self.interval)
        lines = [f"{name!s}: {100 * share:.1f} %" for name, share in self._rows()["accuracy"].items()]
        if self.estimate is not None:
            lines += [self.estimate.words(), f"95 % interval for all images like these: {low:.1f} to {high:.1f} %"]
        else:
            lines.append(f"95 % interval of the worst case: {low:.1f} to {high:.1f} %")
        return "\n".join([*lines, f"n = {self._of(outcomes.WORST, 'n'):.0f}", *self._words()])

    def _repr_html_(self) -> str:
        rows, words = self._rows(), self._words()
        if self.estimate is not None:
            low, high = self.interval
            row = {"accuracy": self.accuracy, "low": low, "high": high, "n": self.estimate.n}
            rows = pd.concat([rows, pd.DataFrame(row, index=["AutoAttack, sampled"])])
            words = [self.estimate.words(), *words]
        share = (100 * rows[["accuracy", "low", "high"]]).round(1)
        interval = share["low"].astype(str) + " to " + share["high"].astype(str)
        columns = {"accuracy, %": share["accuracy"], "95 % interval": interval, "n": rows["n"].astype(int)}
        return pd.DataFrame(columns).rename_axis(None).to_html(border=0) + "".join(f"<p>{escape(w)}</p>" for w in words)
