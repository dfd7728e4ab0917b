"""Study whether runs' losses are flat around their weights, and whether flatness goes with robustness."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Self

import pandas as pd
from matplotlib.figure import Figure

from unmoved.analyses import corruption, flatness, hessian, risks, surface
from unmoved.analyses.risks import ModelRisk
from unmoved.analyses.studies import corruption_figures as figures
from unmoved.analyses.studies.kind import StudyKind, option
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
from unmoved.attacks import PGD
from unmoved.core.batch import Batch
from unmoved.core.errors import require_choice
from unmoved.reports.pages import Section

GRID = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.35, 0.5)  # of the weights' norm
HEADLINE = 0.01  # where the verdict is read, the radius of the APD recipes; the table holds the whole grid
VIEWS = ("clean", "adversarial")
TITLE = "Flatness under parameter corruption"
DRAWS, STEPS = 20, 10
CHUNK = 250  # images that are attacked at a time
SHOWN = {
    "claims": ["view", "indicator", "accuracy", "rho", "low", "high", "runs", "verdict"],
    "indicators": ["run", "view", "i_max", "i_ave", "clean_accuracy", "robust_accuracy"],
}
LEGIBLE = 6  # runs that one figure of curves can hold


@dataclass(frozen=True)
class Corruption(StudyKind):
    """Measure indicators of flatness over a grid of eps, per run and across runs.

    Attributes:
        norm: ``"l2"`` or ``"linf"``, of a corruption; eps is a share of the weights' l2 norm for both.
        top: corrupt at most this many weights of a scope; all by default.
        deep: also layer by layer, on two lines through the weights and on a plane.
        hessian: also the trace and the top eigenvalue of the Hessian, by curvlinops.
    """

    name = "corruption"
    norm: str = option("l2", "l2 or linf, the ball of the weights.", parse=str)
    top: int | None = option(None, "corrupt at most this many weights.", at_least=1)
    deep: bool = option(True, "also layers and loss surfaces.")
    hessian: bool = option(False, "also trace and top eigenvalue (unmoved[hessian]).")

    def __post_init__(self) -> None:
        require_choice("--norm", self.norm, ("l2", "linf"))

    @classmethod
    def for_report(cls) -> Self:
        """Return the analysis without what takes a page of its own: layers and surfaces."""
        return cls(deep=False)

    def prepare(self, run: AnalysedRun) -> None:
        """Corrupt the run's weights."""
        self._measure(run, no_progress)

    def __call__(self, runs: Sequence[AnalysedRun], progress: Progress = no_progress) -> Study:
        """Judge whether flat goes with robust and with accurate."""
        by_run = {
            subject.name: self._measure(subject, part_of(progress, k, len(runs))) for k, subject in enumerate(runs)
        }
        sweep = joined({name: tables["sweep"] for name, tables in by_run.items()})
        summary = flatness.summarise(sweep)
        legible = summary["run"].isin([subject.name for subject in runs[:LEGIBLE]]) & (summary["scope"] == "global")
        drawn = [figures.corruption_curves(summary[legible & (summary["view"] == view)]) for view in VIEWS]
        judged = _against_accuracy(runs, summary)
        tables = {"sweep": sweep, "summary": summary} | judged.tables
        if self.deep:
            for kind, draw in (("lines", figures.loss_lines), ("plane", figures.loss_surface)):
                tables[kind] = joined({name: made[kind] for name, made in by_run.items()})
                drawn.append(draw(tables[kind][tables[kind]["run"] == runs[0].name]))
            layers = (summary["scope"] != "global") & (summary["measure"] == "loss") & (summary["run"] == runs[0].name)
            drawn.append(figures.corruption_layers(summary[layers]))
        if self.hessian:
            tables |= _second_order(runs, summary)
        settings = {
            "eps_relative": GRID,
            "draws": DRAWS,
            "steps": STEPS,
            "p": str(self._p),
            "top": self.top,
        }
        sections = [_across_runs(judged), _run_by_run(judged, drawn, len(runs))]
        n = len(runs[0].split)
        return Study(self.name, TITLE, tables, judged.sentences, sections, n, folders(runs), settings)

    @property
    def _p(self) -> float:
        return 2 if self.norm == "l2" else math.inf

    def _measure(self, run: AnalysedRun, progress: Progress) -> dict[str, pd.DataFrame]:
        """Make the sweep of one run over `GRID`, clean and adversarial; if deep also layers, lines and the plane."""
        images = _Images(run)
        scopes = [(view, "global") for view in VIEWS]
        if self.deep:
            scopes += [("clean", layer) for layer in risks.layers(run.model)]
        parts, sweeps = len(scopes) + self.deep, []
        for k, (view, scope) in enumerate(scopes):
            grid = GRID if scope == "global" else (HEADLINE,)
            key = run.key | {"view": view, "scope": scope, "grid": grid, "draws": DRAWS, "steps": STEPS}
            key |= {"attack": repr(images.attack) if view != "clean" else None, "p": str(self._p), "top": self.top}
            make = partial(self._sweep, images, view, scope, grid)
            sweeps.append(run.cache.table("corruption", key, make))
            progress((k + 1) / parts, f"corruption: {run.name}")
        tables = {"sweep": pd.concat(sweeps, ignore_index=True)}
        if self.deep:
            risk = ModelRisk(run.model, images.clean)
            eps = HEADLINE * math.sqrt(sum(float((p.detach().double() ** 2).sum()) for p in risk.parameters))
            key = run.key | {"view": "clean", "eps": HEADLINE, "steps": STEPS}
            tables["plane"] = run.cache.table("plane", key, lambda: surface.plane(risk, eps, steps=STEPS))
            tables["lines"] = surface.axes(tables["plane"])  # no pass of their own
            progress(1.0, f"loss surface: {run.name}")
        return tables

    def _sweep(self, images: _Images, view: str, scope: str, grid: Sequence[float]) -> pd.DataFrame:
        risk = ModelRisk(images.run.model, images.clean if view == "clean" else images.adversarial, scope=scope)
        n = None if self.top is None else min(self.top, sum(t.numel() for t in risk.parameters))
        return corruption.sweep(risk, grid, p=self._p, n=n, draws=DRAWS, steps=STEPS).assign(view=view)


class _Images:
    """Hold the images of a run as they are, and attacked by PGD-20: once, and not at all where every table is there."""

    def __init__(self, run: AnalysedRun) -> None:
        self.run = run
        self.attack = PGD(run.assembly.threat, steps=20, keep="best")
        self.clean = list(run.split.batches(CHUNK))

    @cached_property
    def adversarial(self) -> list[Batch]:
        moved = [batch.to(next(self.run.model.parameters()).device) for batch in self.clean]
        return [Batch(self.attack(self.run.model, batch), batch.y, batch.index) for batch in moved]


@dataclass(frozen=True)
class _AgainstAccuracy:
    """Hold flatness beside accuracy, over runs that were evaluated alike.

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

    def shown(self, name: str) -> pd.DataFrame | None:
        """Return the rows and columns of a table that the page shows; None where there is no such table."""
        table = self.tables.get(name)
        return None if table is None else table.loc[table["eps_relative"] == HEADLINE, SHOWN[name]]


def _against_accuracy(runs: Sequence[AnalysedRun], summary: pd.DataFrame) -> _AgainstAccuracy:
    """Hold the indicators of a `flatness.summarise` table against the accuracies of the runs."""
    judged = accuracies(runs)
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
        f"is that of {source}. Spearman's rho over {len(runs)} runs, with a bootstrap over runs."
    )
    result = _AgainstAccuracy(how, {"indicators": rows, "claims": claims})
    at = claims["eps_relative"] == HEADLINE
    for view in VIEWS:
        of_view = claims[at & (claims["view"] == view)]
        result.sentences.extend(f"On {view} images: {sentence}" for sentence in of_view["sentence"])
        shown = rows[(rows["view"] == view) & (rows["eps_relative"] == HEADLINE)]
        if (shown["i_max"] > 0).all():
            result.scatters.append(figures.flatness(shown, f"{view} images, {of_view['sentence'].iloc[0]}"))
    return result


def _second_order(runs: Sequence[AnalysedRun], summary: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Return the curvature of the clean loss of each run, and what it predicts beside what was measured."""
    curvatures: dict[str, pd.DataFrame] = {}
    predicted: list[pd.DataFrame] = []
    for subject in runs:
        risk = ModelRisk(subject.model, list(subject.split.batches(CHUNK)))
        make = partial(_curvature, risk)
        curvatures[subject.name] = subject.cache.table("hessian", subject.key, make)
        (row,) = curvatures[subject.name].itertuples(index=False)
        measured = summary[(summary["run"] == subject.name) & (summary["view"] == "clean")]
        predicted.append(hessian.second_order(measured, hessian.Curvature(*row)))
    return {"hessian": joined(curvatures), "second_order": pd.concat(predicted, ignore_index=True)}


def _curvature(risk: ModelRisk) -> pd.DataFrame:
    return pd.DataFrame([vars(hessian.curvature(risk))])


def _across_runs(judged: _AgainstAccuracy) -> Section:
    question = (
        "How much does the loss rise when the weights move by eps (a share of their norm): at random, and in the worst "
        f"direction that {STEPS} gradient steps find? The field's claim is that flat goes with robust and accurate."
    )
    return Section(
        "corruption",
        TITLE,
        [question, judged.how],
        judged.shown("claims"),
        judged.scatters,
    )


def _run_by_run(judged: _AgainstAccuracy, drawn: Sequence[Figure], runs: int) -> Section:
    lead = (
        f"Loss changes in nats at eps = {HEADLINE:g} of the weights' norm: I_max is the worst found, I_ave "
        f"the mean over {DRAWS} random directions, the slope's noise taken out."
    )
    lead += f" The figures draw the first {LEGIBLE} runs." if runs > LEGIBLE else ""
    return Section(
        "corruption-runs",
        "Flatness run by run",
        [lead],
        judged.shown("indicators"),
        list(drawn),
    )
