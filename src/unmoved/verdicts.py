"""Runs -> verdicts: the seeds of one recipe taken together, after a look whether all runs were judged alike.

Accuracies are only comparable for the same data, the same ball and the same attacks; `verdicts` refuses anything else.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from unmoved import outcomes
from unmoved.errors import UnmovedError

if TYPE_CHECKING:
    from unmoved.run import Run


@dataclass(frozen=True, eq=False)
class Protocol:
    """How a run was judged: two runs are comparable when these agree."""

    split: str
    norm: str
    eps: float
    attacks: tuple[str, ...]
    n: int


@dataclass(frozen=True, eq=False)
class Verdict:
    """One recipe, judged: its runs (one per seed) and what they say together."""

    name: str
    runs: tuple[Run, ...]

    @cached_property
    def measures(self) -> dict[str, dict[str, Any]]:
        """By measure ("clean", each attack, "worst case"): the row of `outcomes.across_seeds`."""
        rows: list[dict[Any, Any]] = self._across(outcomes.summary).to_dict("records")
        return {row["measure"]: row for row in rows}

    @cached_property
    def by_seed(self) -> pd.DataFrame:
        """`outcomes.summary` of each run, with columns recipe and seed."""
        rows = [outcomes.summary(judged(run)).assign(recipe=self.name, seed=run.seed) for run in self.runs]
        return pd.concat(rows, ignore_index=True)

    @cached_property
    def classes(self) -> pd.DataFrame:
        """`outcomes.per_class` across the seeds."""
        return self._across(outcomes.per_class)

    @cached_property
    def curve(self) -> pd.DataFrame | None:
        """`outcomes.curve_summary` across the seeds that have a curve; None where none has."""
        tables = [run.curve for run in self.runs if run.curve is not None]
        if not tables:
            return None
        return outcomes.across_seeds(tables, outcomes.curve_summary).assign(recipe=self.name)

    @cached_property
    def metrics(self) -> pd.DataFrame | None:
        """What training logged, with a column seed; None where nothing was trained here."""
        tables = [run.metrics.assign(seed=run.seed) for run in self.runs if len(run.metrics)]
        return pd.concat(tables, ignore_index=True) if tables else None

    @property
    def gallery(self) -> dict[str, np.ndarray] | None:
        """The gallery of the first seed that has one."""
        return next((run.gallery for run in self.runs if run.gallery is not None and len(run.gallery["x"])), None)

    @property
    def seconds(self) -> float | None:
        """Training time of a run, in the mean over seeds; None where nothing was trained here."""
        return None if self.metrics is None else float(self.metrics.groupby("seed")["seconds"].max().mean())

    @property
    def weights(self) -> str:
        """Which weights were judged: "best" or "last"."""
        return str((self.runs[0].evaluation or {}).get("weights", "unknown"))

    def _across(self, measure: Callable[[pd.DataFrame], pd.DataFrame]) -> pd.DataFrame:
        return outcomes.across_seeds([judged(run) for run in self.runs], measure)


def judged(run: Run) -> pd.DataFrame:
    """The run's outcomes.

    Raises:
        UnmovedError: the run was not evaluated, or its outcomes do not hold the samples that its evaluation names.
    """
    if run.evaluation is None or run.outcomes is None:
        raise UnmovedError(f"{run.path}: expected an evaluated run, came none; run `unmoved evaluate {run.path}` first")
    n = run.outcomes["index"].nunique()
    if run.evaluation.get("n", n) != n:
        raise UnmovedError(
            f"{run.path}: expected outcomes of {run.evaluation['n']} samples, came {n}; "
            f"run `unmoved evaluate {run.path}` again"
        )
    return run.outcomes


def protocol(run: Run) -> Protocol:
    """How the run was judged, from its outcomes and its evaluation."""
    table = judged(run)
    return Protocol(
        split=str((run.evaluation or {}).get("split", "unknown")),
        norm=str(table["norm"].iloc[0]),
        eps=float(table["eps"].max()),
        attacks=tuple(sorted(table["attack"].unique())),
        n=int(table["index"].nunique()),
    )


def verdicts(runs: Sequence[Run]) -> list[Verdict]:
    """The runs grouped by recipe, in order of appearance. Recipes that differ in more than seeds stay apart.

    Two different recipes of one name are told apart by the name of their first run's folder.

    Raises:
        UnmovedError: no run; a run without evaluation; runs judged on different data, in different balls, by different
            attacks; one recipe with a seed twice, or whose seeds were judged on best weights here and last ones there.
    """
    if not runs:
        raise UnmovedError("expected at least one run, came none")
    _require_alike(runs)
    groups: dict[tuple[str, str], list[Run]] = {}
    for run in runs:
        recipe = json.dumps(_without_seeds(run.recipe), sort_keys=True, default=str)
        groups.setdefault((run.name, recipe), []).append(run)
    for (name, _), members in groups.items():
        seeds, paths = [run.seed for run in members], ", ".join(str(run.path) for run in members)
        if len(set(seeds)) < len(seeds):
            raise UnmovedError(f"recipe {name!r}: expected each seed once, came {seeds} in {paths}; leave one run out")
        weights = [(run.evaluation or {}).get("weights") for run in members]
        if len(set(weights)) > 1:
            raise UnmovedError(f"recipe {name!r}: seeds judged on {weights} weights in {paths}; evaluate them alike")
    names = [name for name, _ in groups]
    return [
        Verdict(name if names.count(name) == 1 else f"{name} [{members[0].path.name}]", tuple(members))
        for (name, _), members in groups.items()
    ]


def _require_alike(runs: Sequence[Run]) -> None:
    first = vars(protocol(runs[0]))
    labels = judged(runs[0])[["index", "label"]].drop_duplicates()
    for run in runs[1:]:
        for name, value in vars(protocol(run)).items():
            if value != first[name]:
                raise UnmovedError(
                    f"expected runs judged alike, came {name} = {first[name]} in {runs[0].path} and {value} in "
                    f"{run.path}; evaluate them alike, or report on them apart"
                )
        labels = pd.concat([labels, judged(run)[["index", "label"]]]).drop_duplicates()
        if labels["index"].duplicated().any():
            raise UnmovedError(
                f"expected runs on the same data, came other labels in {run.path} than in {runs[0].path}; "
                "report on each data set apart"
            )


def _without_seeds(value: Any) -> Any:
    return {k: _without_seeds(v) for k, v in value.items() if k != "seed"} if isinstance(value, Mapping) else value
