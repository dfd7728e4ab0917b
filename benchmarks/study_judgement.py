"""Judge a method of the study beside what it is added to, by the rule of docs/studies/protocol.md."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import NormalDist

import numpy as np
import pandas as pd
from scipy import stats

from unmoved.core.errors import UnmovedError
from unmoved.evaluation.estimate import Estimate

SHOWN, SUGGESTED, NO = "shown", "suggested", "not shown"
LEAST_SEEDS = 3
ERROR = 0.05
Interval = tuple[float, float]


def mean(values: Iterable[float]) -> float:
    listed = list(values)
    return math.fsum(listed) / len(listed)


@dataclass(frozen=True, eq=False)
class Outcome:
    """A run of the study: its row in the table of runs, and the table of its images at ``path``."""

    row: Mapping[str, str]
    path: Path

    @property
    def seed(self) -> int:
        return int(self.row["seed"])

    @property
    def label(self) -> str:
        return f"{self.row['method']} seed {self.seed}"

    @property
    def failed(self) -> bool:
        return bool(self.row["failed"])

    @property
    def is_complete(self) -> bool:
        return self.row["complete"] == "yes"

    @property
    def is_doubted(self) -> bool:
        return self.row["grade"] == "do not believe"

    def number(self, name: str) -> float:
        return float(self.row[name])

    def share(self, measure: str) -> float:
        """Return the accuracy by "clean", "pgd40" or "autoattack", as a share."""
        return self.number("left" if measure == "autoattack" else measure) / int(self.row["n"])

    @cached_property
    def images(self) -> pd.DataFrame:
        """Return the table of images, by their identities."""
        return pd.read_csv(self.path).set_index("index").sort_index()

    def of_classes(self) -> pd.Series:
        """Return the share of clean images that are right, by label."""
        images = self.images
        return (images["label"] == images["clean_prediction"]).groupby(images["label"]).mean()

    def stands(self, measure: str) -> np.ndarray:
        """Return which images are right and, by what was asked, not broken; (n,) bool."""
        images = self.images
        right = (images["label"] == images["clean_prediction"]).to_numpy()
        if measure == "clean":
            return right
        if measure == "pgd40":
            return right & (images["pgd40"] == 0).to_numpy()
        stands = right & (images["autoattack"].fillna(0) == 0).to_numpy()
        return stands if self.is_complete else stands & (images["quick"] == 0).to_numpy()

    def left(self, share: float) -> tuple[float, float]:
        """Return the least and the most images that `quick` and AutoAttack together leave; one number if complete.

        Args:
            share: of the error that its sample spent.
        """
        if self.is_complete:
            return self.number("left"), self.number("left")
        counts = ("n", "survivors", "near", "near_broken", "far_asked", "far_broken")
        return Estimate(*(int(self.row[name]) for name in counts), error=share * self.number("error")).interval


@dataclass(frozen=True)
class Judged:
    """A difference in points, with its intervals over seeds and over images, and the word that they give it."""

    mean: float
    seeds: Interval | None
    images: Interval | None
    count: int

    @property
    def word(self) -> str:
        apart = sum(_on_side(interval, self.mean) for interval in (self.seeds, self.images))
        return (NO, SUGGESTED, SHOWN)[apart]

    @property
    def gains(self) -> bool:
        return self.mean > 0


def _on_side(interval: Interval | None, value: float) -> bool:
    """Return whether the whole interval lies on this value's side of zero."""
    return interval is not None and (interval[0] > 0 if value > 0 else interval[1] < 0 if value < 0 else False)


@dataclass(frozen=True)
class Comparison:
    """A method beside its base, by measure."""

    method: str
    base: str
    measures: Mapping[str, Judged]

    def words(self) -> str:
        """Say what the protocol has a name for: better at no price, masking."""
        clean, pgd, robust = (self.measures[name] for name in ("clean", "pgd40", "autoattack"))
        if robust.gains and robust.word == SHOWN:
            is_dear = clean.word == SHOWN and not clean.gains
            return "better, at a price in clean accuracy" if is_dear else "better at no price"
        if pgd.gains and pgd.word == SHOWN and not (robust.gains and robust.word == SUGGESTED):
            return f"masking: PGD-40 {pgd.mean:+.1f}, AutoAttack {robust.mean:+.1f}"
        return "worse" if robust.word == SHOWN else ""


def compared(pairs: Sequence[tuple[Outcome, Outcome]], measure: str) -> Judged:
    """Judge the difference of a method and its base, paired by seed.

    Args:
        pairs: (method, base) of each seed.
        measure: "clean", "pgd40" or "autoattack".
    """
    differences = [100 * (one.share(measure) - other.share(measure)) for one, other in pairs]
    # Rounded, so that seeds with the same difference stay in their order, whatever its last digit says.
    middle = sorted(range(len(pairs)), key=lambda k: round(differences[k], 6))[(len(pairs) - 1) // 2]
    low, high = over_images(*pairs[middle], measure)
    return Judged(mean(differences), over_seeds(differences), (100 * low, 100 * high), len(pairs))


def over_seeds(differences: Sequence[float]) -> Interval | None:
    """Return ``mean -+ t_{0.975, k - 1} sd / sqrt(k)`` (Student 1908); None with fewer than three seeds."""
    k = len(differences)
    if k < LEAST_SEEDS:
        return None
    half = float(stats.t.ppf(1 - ERROR / 2, k - 1)) * float(np.std(differences, ddof=1)) / math.sqrt(k)
    return mean(differences) - half, mean(differences) + half


def over_images(one: Outcome, other: Outcome, measure: str) -> Interval:
    """Return a 95 % interval of the difference in accuracy on images like these, paired by image.

    Where all outcomes are known, ``mean d -+ 1.96 sd(d) / sqrt(n)`` with d_i in {-1, 0, 1}, as `reports.paired`.

    Where AutoAttack was asked about a sample, two things are not known, and each gets half of the error (Bonferroni):
    how many of these n images are left, by the exact intervals of both estimates, each with its part of that half; and
    how far n images are from all images like them, by the same formula, with a bound in the place of the variance:
    ``var d <= E d^2``, the share of images with different outcomes. By the triangle inequality that is at most the
    share that differ as far as was asked, and those of either that may still break. No correlation of the two samples
    is counted on, so the interval errs to the wide side.

    Raises:
        UnmovedError: runs on different images.
    """
    if not one.images.index.equals(other.images.index):
        raise UnmovedError(f"expected runs on the same images, came {one.path} and {other.path}")
    ours, theirs = (run.stands(measure) for run in (one, other))
    n = len(ours)
    sampled = 0 if measure != "autoattack" else sum(not run.is_complete for run in (one, other))
    if not sampled:
        d = ours.astype(float) - theirs
        half = NormalDist().inv_cdf(1 - ERROR / 2) * float(d.std(ddof=1)) / math.sqrt(n)
        return float(d.mean()) - half, float(d.mean()) + half
    # What a sample spent is at most ERROR in all its looks; these shares of it add up to half of ERROR.
    (low, high), (base_low, base_high) = (run.left(0.5 / sampled) for run in (one, other))
    unknown = (int(ours.sum()) - low) + (int(theirs.sum()) - base_low)
    differ = min(1.0, (int((ours != theirs).sum()) + unknown) / n)
    half = NormalDist().inv_cdf(1 - ERROR / 4) * math.sqrt(differ / n)
    return (low - base_high) / n - half, (high - base_low) / n + half
