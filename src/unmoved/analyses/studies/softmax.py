"""Study whether the result of attacks on runs follows the softmax over the wrong classes."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import pandas as pd

from unmoved.analyses import softmax
from unmoved.analyses.studies import softmax_figures
from unmoved.analyses.studies.study import AnalysedRun, Progress, Study, accuracies, no_progress, part_of
from unmoved.attacks import APGD, FMN
from unmoved.reports.pages import Section

CHUNK = 250  # samples that an interruption may cost
HEADLINE = "variance"  # the statistic that the verdict is about; the tables hold them all


def observe(subject: AnalysedRun, progress: Progress = no_progress) -> pd.DataFrame:
    """`softmax.collect_batch` of a run's images, chunk by chunk: APGD for success, FMN for the minimal eps."""
    attack, nearest = APGD(subject.assembly.threat), FMN(subject.assembly.threat)
    tables, done = [], 0
    for batch in subject.split.batches(CHUNK):
        question = subject.question | {
            "attack": repr(attack),
            "nearest": repr(nearest),
            "from": done,
            "to": done + len(batch),
        }
        make = partial(softmax.collect_batch, subject.model, batch, attack, subject.assembly.threat, nearest)
        tables.append(subject.shelf.table("softmax", question, make))
        done += len(batch)
        progress(done / len(subject.split), f"softmax: {subject.name}")
    return pd.concat(tables, ignore_index=True)


def study(found: Sequence[AnalysedRun], progress: Progress = no_progress) -> Study:
    """Per run and across runs; with one run, or fewer than four, the last part says that it knows too little."""
    seen = {subject.name: observe(subject, part_of(progress, k, len(found))) for k, subject in enumerate(found)}
    inside = {name: softmax.within(table) for name, table in seen.items()}
    landed = {name: softmax.landings(table) for name, table in seen.items()}
    summary = softmax.summary(seen)
    judged = accuracies(found)
    source = "APGD with cross-entropy"
    if judged is not None:
        figures, source = judged
        for column, place in (("clean_accuracy", 0), ("robust_accuracy", 1)):
            summary[column] = [figures[name][place] for name in summary["run"]]
    correlations = softmax.across(summary)
    claims = softmax.claims(inside, landed, correlations, HEADLINE)
    both = {
        "within": pd.concat([table.assign(run=name) for name, table in inside.items()], ignore_index=True),
        "landings": pd.concat([table.assign(run=name) for name, table in landed.items()], ignore_index=True),
    }
    drawn = [softmax_figures.within(both["within"]), softmax_figures.within(both["within"], measure="Spearman")]
    if both["landings"]["share"].notna().any():
        drawn.append(softmax_figures.landings(both["landings"]))
    drawn += [
        softmax_figures.across(summary, correlations, against=name) for name in ("robust_accuracy", "clean_accuracy")
    ]
    sentences = [claim.sentence for claim in claims]
    return Study(
        "softmax",
        "Softmax over the wrong classes",
        {
            "samples": pd.concat([table.assign(run=name) for name, table in seen.items()], ignore_index=True),
            **both,
            "summary": summary,
            "across": correlations,
            "claims": pd.DataFrame([vars(claim) for claim in claims]),
        },
        sentences,
        [
            Section(
                "softmax",
                "Softmax over the wrong classes",
                [
                    "Does the result of an attack follow how unevenly the softmax spreads over the wrong classes "
                    "(DRSL's claim)? Within each model, over its correctly classified images; then across models.",
                    f"Robust accuracies across runs are those of {source}.",
                    *sentences,
                ],
                None,
                drawn,
            )
        ],
        {
            "n": len(found[0].split),
            "runs": [str(subject.run.path) for subject in found],
            "robust_accuracy": source,
            "attack": repr(APGD(found[0].assembly.threat)),
            "nearest": repr(FMN(found[0].assembly.threat)),
        },
    )
