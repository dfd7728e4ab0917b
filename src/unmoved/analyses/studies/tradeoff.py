"""Study the price of robustness, over recipes, strengths and seeds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

import pandas as pd

from unmoved.analyses import pareto
from unmoved.analyses.pareto import claims
from unmoved.analyses.studies.study import AnalysedRun, Study, answers
from unmoved.analyses.studies.tradeoff_figures import pareto as pareto_figure
from unmoved.core.errors import UnmovedError
from unmoved.evaluation.outcomes import CLEAN, WORST
from unmoved.reports.pages import Section


def study(found: Sequence[AnalysedRun]) -> Study:
    """The front of clean against robust accuracy, from the evaluations that all runs have alike.

    Raises:
        UnmovedError: runs without a common evaluation.
    """
    judged = answers(found)
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
            for subject in found
        }
    )
    words = claims(result.areas, result.dominance)
    tables: dict[str, pd.DataFrame] = {name: getattr(result, name) for name in asdict(result)}
    tables["verdict"] = words
    n = int(result.points["n"].iloc[0])
    return Study(
        "tradeoff",
        "The price of robustness",
        tables,
        list(words["words"]),
        [
            Section(
                "pareto",
                "The price of robustness",
                [
                    f"Which method reaches which clean and robust accuracy ({source}, n = {n}), and which stretch of "
                    "the front is whose. Intervals are bootstraps over the images and say nothing of other seeds.",
                    *words["words"],
                ],
                result.stretches,
                [pareto_figure(result.points)],
            )
        ],
        {"n": n, "runs": [str(subject.run.path) for subject in found], "robust_accuracy": source},
    )


def _setting(subject: AnalysedRun) -> tuple[str, float]:
    """(method, strength): the recipe and its one swept number; NaN where nothing, or more than one, was swept."""
    swept = subject.assembly.recipe.swept
    if swept is None or len(swept.values) != 1:
        return subject.run.name, float("nan")
    (value,) = swept.values.values()
    try:
        return swept.method, float(value)
    except ValueError:
        return subject.run.name, float("nan")
