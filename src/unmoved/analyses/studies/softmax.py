"""Study whether the result of attacks on runs follows the softmax over the wrong classes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import pandas as pd
from matplotlib.figure import Figure

from unmoved.analyses import softmax
from unmoved.analyses.studies import softmax_figures
from unmoved.analyses.studies.kind import StudyKind
from unmoved.analyses.studies.study import (
    AnalysedRun,
    Progress,
    Study,
    accuracies,
    folders,
    joined,
    no_progress,
    part_of,
)
from unmoved.attacks import APGD, FMN
from unmoved.reports.drawing import foremost
from unmoved.reports.pages import Section

CHUNK = 250  # samples that an interruption may cost
HEADLINE = "variance"  # the statistic that the verdict is about; the tables hold them all
TITLE = "Softmax over the wrong classes"
ACCURACIES = ("clean_accuracy", "robust_accuracy")


def observe(subject: AnalysedRun, progress: Progress = no_progress) -> pd.DataFrame:
    """Apply `softmax.collect_batch` to a run's images, in chunks: APGD for success, FMN for the minimal eps."""
    attack, nearest = APGD(subject.assembly.threat), FMN(subject.assembly.threat)
    tables, done = [], 0
    for batch in subject.split.batches(CHUNK):
        key = subject.key | {
            "attack": repr(attack),
            "nearest": repr(nearest),
            "from": done,
            "to": done + len(batch),
        }
        make = partial(softmax.collect_batch, subject.model, batch, attack, subject.assembly.threat, nearest)
        tables.append(subject.cache.table("softmax", key, make))
        done += len(batch)
        progress(done / len(subject.split), f"softmax: {subject.name}")
    return pd.concat(tables, ignore_index=True)


@dataclass(frozen=True)
class Softmax(StudyKind):
    """Test the claim of DRSL by a reconstruction of its analysis, run by run and across runs.

    With fewer than four runs the last part is undecided.
    """

    name = "softmax"

    def prepare(self, run: AnalysedRun) -> None:
        """Attack the run's images."""
        observe(run)

    def __call__(self, runs: Sequence[AnalysedRun], progress: Progress = no_progress) -> Study:
        """Judge the claim within each run and across them."""
        samples = {subject.name: observe(subject, part_of(progress, k, len(runs))) for k, subject in enumerate(runs)}
        within = {name: softmax.within(table) for name, table in samples.items()}
        landings = {name: softmax.landings(table) for name, table in samples.items()}
        summary = softmax.summary(samples)
        judged = accuracies(runs)
        source = "APGD with cross-entropy"
        if judged is not None:
            shares, source = judged
            for place, column in enumerate(ACCURACIES):
                summary[column] = [shares[name][place] for name in summary["run"]]
        correlations = softmax.across(summary)
        claims = softmax.claims(within, landings, correlations, HEADLINE)
        sentences = [claim.sentence for claim in claims]
        text = [
            "Does the result of an attack follow how unevenly the softmax spreads over the wrong classes "
            "(DRSL's claim)? Within each model, over its correctly classified images; then across models.",
            f"Robust accuracies across runs are those of {source}.",
            *sentences,
        ]
        tables = {
            "samples": joined(samples),
            "within": joined(within),
            "landings": joined(landings),
            "summary": summary,
            "across": correlations,
            "claims": pd.DataFrame([vars(claim) for claim in claims]),
        }
        settings = {
            "robust_accuracy": source,
            "attack": repr(APGD(runs[0].assembly.threat)),
            "nearest": repr(FMN(runs[0].assembly.threat)),
        }
        section = Section("softmax", TITLE, text, None, _figures(tables))
        return Study(self.name, TITLE, tables, sentences, [section], len(runs[0].split), folders(runs), settings)


def _figures(tables: Mapping[str, pd.DataFrame]) -> list[Figure]:
    accuracy = dict(zip(tables["summary"]["run"].astype(str), tables["summary"]["robust_accuracy"], strict=True))
    best, _ = foremost(list(accuracy), lambda run: -accuracy[run])
    figures = [
        softmax_figures.within(tables["within"], measure=measure, foremost_runs=best) for measure in ("AUC", "Spearman")
    ]
    if tables["landings"]["share"].notna().any():
        figures.append(softmax_figures.landings(tables["landings"]))
    summary, correlations = tables["summary"], tables["across"]
    return figures + [softmax_figures.across(summary, correlations, against=name) for name in reversed(ACCURACIES)]
