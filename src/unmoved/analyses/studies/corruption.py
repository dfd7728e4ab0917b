"""Study whether runs' losses are flat around their weights, and whether flatness goes with robustness."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from unmoved.analyses import corruption, flatness, hessian, surface
from unmoved.analyses.risks import ModelRisk, layers
from unmoved.analyses.studies.corruption_figures import corruption_curves, corruption_layers, loss_lines, loss_surface
from unmoved.analyses.studies.corruption_figures import flatness as flatness_figure
from unmoved.analyses.studies.study import AnalysedRun, Progress, Study, accuracies, no_progress, part_of
from unmoved.attacks import PGD
from unmoved.core.batch import Batch
from unmoved.reports.pages import Section

GRID = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.35, 0.5)  # of the weights' norm
HEADLINE = 0.01  # where the verdict is read, the radius of the APD recipes; the table holds the whole grid
VIEWS = ("clean", "adversarial")
TITLE = "Flatness under parameter corruption"
DRAWS, STEPS = 20, 10
LEGIBLE = 6  # runs that one figure of curves can hold


def measure(
    subject: AnalysedRun, *, deep: bool = False, p: float = 2, top: int | None = None, progress: Progress = no_progress
) -> dict[str, pd.DataFrame]:
    """The sweeps of one run over `GRID`, clean and adversarial; ``deep`` adds layers, lines and the surface."""
    attack = PGD(subject.assembly.threat, steps=20, keep="best")
    batches = list(subject.split.batches(250))
    made: dict[str, pd.DataFrame] = {}
    attacked: list[Batch] = []

    def risk(view: str, scope: str = "global") -> ModelRisk:
        if view == "clean":
            return ModelRisk(subject.model, batches, scope=scope)
        if not attacked:  # once for all; not at all where every table is there
            for batch in batches:
                here = batch.to(next(subject.model.parameters()).device)
                attacked.append(Batch(attack(subject.model, here), here.y, here.index))
        return ModelRisk(subject.model, attacked, scope=scope)

    scopes = [("clean", scope) for scope in layers(subject.model)] if deep else []
    parts = len(VIEWS) + len(scopes) + deep
    for k, (view, scope) in enumerate([*((view, "global") for view in VIEWS), *scopes]):
        grid = GRID if scope == "global" else (HEADLINE,)
        question = subject.question | {"view": view, "scope": scope, "grid": grid, "draws": DRAWS, "steps": STEPS}
        question |= {"attack": repr(attack) if view != "clean" else None, "p": str(p), "top": top}
        made[f"{view} {scope}"] = subject.shelf.table(
            "corruption",
            question,
            partial(_sweep, risk, view, scope, grid, p, top),
        )
        progress((k + 1) / parts, f"corruption: {subject.name}")
    sweeps = pd.concat(made.values(), ignore_index=True)
    found = {"sweep": sweeps}
    if deep:
        whole = ModelRisk(subject.model, batches)
        size = math.sqrt(sum(float((p.detach().double() ** 2).sum()) for p in whole.parameters))
        question = subject.question | {"view": "clean", "eps": HEADLINE, "steps": STEPS}
        found["plane"] = subject.shelf.table(
            "plane", question, lambda: surface.plane(whole, HEADLINE * size, steps=STEPS)
        )
        found["lines"] = surface.axes(found["plane"])  # no pass of their own
        progress(1.0, f"loss surface: {subject.name}")
    return found


def curvature(subject: AnalysedRun) -> pd.DataFrame:
    """Trace and top eigenvalue of the Hessian of the clean loss, by curvlinops (the extra ``hessian``)."""
    risk = ModelRisk(subject.model, list(subject.split.batches(250)))
    return subject.shelf.table("hessian", subject.question, lambda: pd.DataFrame([vars(hessian.curvature(risk))]))


def study(
    found: Sequence[AnalysedRun],
    *,
    deep: bool = True,
    with_hessian: bool = False,
    p: float = 2,
    top: int | None = None,
    progress: Progress = no_progress,
) -> Study:
    """Indicators over a grid, per run and across runs; with ``deep`` also by layer and as a surface.

    Args:
        p: 2 or inf, the norm of a corruption; eps is a share of the weights' l2 norm for both.
        top: corrupt at most this many weights of a scope; all by default.
    """
    every = {
        subject.name: measure(subject, deep=deep, p=p, top=top, progress=part_of(progress, k, len(found)))
        for k, subject in enumerate(found)
    }
    sweep = _joined({name: tables["sweep"] for name, tables in every.items()})
    summary = flatness.summarise(sweep)
    few = summary["run"].isin([subject.name for subject in found[:LEGIBLE]]) & (summary["scope"] == "global")
    drawn = [corruption_curves(summary[few & (summary["view"] == view)]) for view in VIEWS]
    judged = _against_accuracy(found, summary)
    tables = {"sweep": sweep, "summary": summary} | judged.tables
    if deep:
        for kind, figure in (("lines", loss_lines), ("plane", loss_surface)):
            tables[kind] = _joined({name: made[kind] for name, made in every.items()})
            drawn.append(figure(tables[kind][tables[kind]["run"] == found[0].name]))
        layered = (summary["scope"] != "global") & (summary["measure"] == "loss") & (summary["run"] == found[0].name)
        drawn.append(corruption_layers(summary[layered]))
    if with_hessian:
        tables |= _second_order(found, summary)
    settings = {
        "n": len(found[0].split),
        "runs": [str(subject.run.path) for subject in found],
        "eps_relative": GRID,
        "draws": DRAWS,
        "steps": STEPS,
        "p": str(p),
        "top": top,
    }
    sections = [_across_runs(judged), _run_by_run(judged, drawn, len(found))]
    return Study("corruption", TITLE, tables, judged.sentences, sections, settings)


@dataclass(frozen=True)
class _AgainstAccuracy:
    """Flatness beside accuracy, over runs that were evaluated alike.

    Attributes:
        how: what the claims are read from, in words.
        tables: indicators and claims; empty where the runs were not evaluated alike.
        sentences: the claims at `HEADLINE`.
        scatters: flatness against robust accuracy, a figure a view.
    """

    how: str
    tables: dict[str, pd.DataFrame] = field(default_factory=dict)
    sentences: list[str] = field(default_factory=list)
    scatters: list[Figure] = field(default_factory=list)


def _against_accuracy(found: Sequence[AnalysedRun], summary: pd.DataFrame) -> _AgainstAccuracy:
    """Hold the indicators of a `flatness.summarise` table against the accuracies of the runs."""
    judged = accuracies(found)
    if judged is None:
        return _AgainstAccuracy(
            "No accuracies that all runs have alike: evaluate them alike to see whether flatness goes with robustness."
        )
    accuracy, source = judged
    rows = pd.concat([flatness.indicators(summary, eps) for eps in GRID], ignore_index=True)
    rows = rows.assign(
        name=rows["run"],
        clean_accuracy=[accuracy[name][0] for name in rows["run"]],
        robust_accuracy=[accuracy[name][1] for name in rows["run"]],
    )
    judgements: list[pd.DataFrame] = []
    for view in VIEWS:
        for eps in GRID:
            some = rows[(rows["view"] == view) & (rows["eps_relative"] == eps)]
            judgements.append(flatness.claims(some).assign(view=view, eps_relative=eps))
    claims = pd.concat(judgements, ignore_index=True)
    how = (
        f"Read at eps = {HEADLINE:g} of the weights' norm (claims.csv has every eps of the grid); robust accuracy "
        f"is that of {source}. Spearman's rho over {len(found)} runs, with a bootstrap over runs."
    )
    result = _AgainstAccuracy(how, {"indicators": rows, "claims": claims})
    at = claims["eps_relative"] == HEADLINE
    for view in VIEWS:
        said = claims[at & (claims["view"] == view)]
        result.sentences.extend(f"On {view} images: {sentence}" for sentence in said["sentence"])
        shown = rows[(rows["view"] == view) & (rows["eps_relative"] == HEADLINE)]
        if (shown["i_max"] > 0).all():
            result.scatters.append(flatness_figure(shown, f"{view} images, {said['sentence'].iloc[0]}"))
    return result


def _second_order(found: Sequence[AnalysedRun], summary: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """The curvature of each run, and what it predicts beside what was measured."""
    curved = {subject.name: curvature(subject) for subject in found}
    beside: list[pd.DataFrame] = []
    for name, row in curved.items():
        facts: dict[str, Any] = row.iloc[0].to_dict()  # type: ignore[assignment]
        ours = summary[(summary["run"] == name) & (summary["view"] == "clean")]
        beside.append(hessian.second_order(ours, hessian.Curvature(**facts)))
    return {"hessian": _joined(curved), "second_order": pd.concat(beside, ignore_index=True)}


def _across_runs(judged: _AgainstAccuracy) -> Section:
    question = (
        "How much does the loss rise when the weights move by eps (a share of their norm): at random, and in the worst "
        f"direction that {STEPS} gradient steps find? The field's claim is that flat goes with robust and accurate."
    )
    return Section("corruption", TITLE, [question, judged.how], _claims(judged.tables.get("claims")), judged.scatters)


def _run_by_run(judged: _AgainstAccuracy, drawn: Sequence[Figure], runs: int) -> Section:
    lead = (
        f"Loss changes in nats at eps = {HEADLINE:g} of the weights' norm: I_max is the worst found, I_ave "
        f"the mean over {DRAWS} random directions, the slope's noise taken out."
    )
    lead += f" The figures draw the first {LEGIBLE} runs." if runs > LEGIBLE else ""
    return Section(
        "corruption-runs", "Flatness run by run", [lead], _shown(judged.tables.get("indicators")), list(drawn)
    )


def _sweep(
    risk: Callable[[str, str], ModelRisk], view: str, scope: str, grid: Sequence[float], p: float, top: int | None
) -> pd.DataFrame:
    at = risk(view, scope)
    n = None if top is None else min(top, sum(t.numel() for t in at.parameters))
    return corruption.sweep(at, grid, p=p, n=n, draws=DRAWS, steps=STEPS).assign(view=view)


def _joined(tables: dict[str, pd.DataFrame]) -> pd.DataFrame:
    return pd.concat([table.assign(run=name) for name, table in tables.items()], ignore_index=True)


def _claims(claims: pd.DataFrame | None) -> pd.DataFrame | None:
    if claims is None:
        return None
    rows = claims[claims["eps_relative"] == HEADLINE]
    return rows[["view", "indicator", "accuracy", "rho", "low", "high", "runs", "verdict"]]


def _shown(rows: pd.DataFrame | None) -> pd.DataFrame | None:
    if rows is None:
        return None
    rows = rows[rows["eps_relative"] == HEADLINE]
    return rows[["run", "view", "i_max", "i_ave", "clean_accuracy", "robust_accuracy"]]
