"""Study the price of robustness in clean accuracy, over recipes, strengths and seeds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import pandas as pd

from unmoved.analyses import pareto
from unmoved.analyses.studies import tradeoff_figures
from unmoved.analyses.studies.kind import StudyKind
from unmoved.analyses.studies.study import AnalysedRun, Progress, Study, answers, folders, no_progress
from unmoved.core.errors import UnmovedError
from unmoved.evaluation.outcomes import CLEAN, WORST
from unmoved.reports.pages import Section

TITLE = "The price of robustness"
STRETCHES = {
    "method": "method",
    "strength": "strength",
    "from": "on the front from clean accuracy",
    "to": "to",
    "robust": "robust accuracy",
    "share": "share of bootstraps",
}


@dataclass(frozen=True)
class TradeOff(StudyKind):
    """Find the front of clean against robust accuracy, from the evaluations that all runs have alike."""

    name = "tradeoff"

    def __call__(self, runs: Sequence[AnalysedRun], progress: Progress = no_progress) -> Study:
        """Draw the front, and judge which methods are on it.

        Raises:
            UnmovedError: runs without a common evaluation.
        """
        judged = answers(runs)
        if judged is None:
            raise UnmovedError(
                "tradeoff: expected runs that were all judged by the same attacks on the same images, came others; "
                "evaluate each with the same --attacks and --n"
            )
        samples, source = judged
        result = pareto.trade_off(
            {
                (*_setting(subject), subject.run.seed): (
                    samples[subject.name][CLEAN].to_numpy(bool),
                    samples[subject.name][WORST].to_numpy(bool),
                )
                for subject in runs
            }
        )
        verdict = pareto.claims(result.areas, result.dominance)
        tables: dict[str, pd.DataFrame] = {one.name: getattr(result, one.name) for one in fields(result)}
        n = int(result.points["n"].iloc[0])
        text = [
            f"Which method reaches which clean and robust accuracy ({source}, n = {n}), and which stretch of "
            "the front is whose. Intervals are bootstraps over the images and say nothing of other seeds.",
            *verdict["words"],
        ]
        return Study(
            self.name,
            TITLE,
            tables | {"verdict": verdict},
            list(verdict["words"]),
            [Section("pareto", TITLE, text, _shown(result.stretches), [tradeoff_figures.pareto(result.points)])],
            n,
            folders(runs),
            {"robust_accuracy": source},
        )


def _shown(stretches: pd.DataFrame) -> pd.DataFrame:
    """Return the stretches of the front as the page shows them; without strengths where no method has one."""
    return stretches[list(STRETCHES)].dropna(axis="columns", how="all").rename(columns=STRETCHES)


def _setting(subject: AnalysedRun) -> tuple[str, float]:
    """Return (method, strength): the recipe and its one swept number; NaN where none, or more than one, was swept."""
    swept = subject.assembly.recipe.swept
    if swept is None or len(swept.values) != 1:
        return subject.run.name, float("nan")
    (value,) = swept.values.values()
    try:
        return swept.method, float(value)
    except ValueError:
        return subject.run.name, float("nan")
