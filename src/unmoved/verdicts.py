"""Runs -> verdicts: the seeds of one recipe taken together, after a look whether all runs were judged alike.

Accuracies are only comparable on the same data, in the same ball, under the same attacks; `verdicts` refuses anything
else.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pandas as pd

from unmoved import outcomes
from unmoved.errors import UnmovedError

if TYPE_CHECKING:
    from unmoved.run import Run


class Protocol(NamedTuple):
    """How a run was judged: two runs are comparable when these agree."""

    split: str
    norm: str
    eps: float
    attacks: tuple[str, ...]
    n: int


@dataclass(frozen=True, eq=False)
class Judged:
    """An evaluated run, read from its folder once (a `Run` reads its files anew each time it is asked)."""

    path: Path
    name: str
    seed: int
    recipe: dict[str, Any]
    provenance: dict[str, Any]
    metrics: pd.DataFrame
    outcomes: pd.DataFrame
    curve: pd.DataFrame | None
    gallery: dict[str, np.ndarray] | None
    evaluation: dict[str, Any]

    @classmethod
    def of(cls, run: Run) -> Judged:
        """Read a run.

        Raises:
            UnmovedError: it was not evaluated, or its outcomes do not hold the samples that its evaluation names.
        """
        evaluation, table = run.evaluation, run.outcomes
        if evaluation is None or table is None:
            raise UnmovedError(
                f"{run.path}: expected an evaluated run, came none; run `unmoved evaluate {run.path}` first"
            )
        n = table["index"].nunique()
        if evaluation.get("n", n) != n:
            raise UnmovedError(
                f"{run.path}: expected outcomes of {evaluation['n']} samples, came {n}; "
                f"run `unmoved evaluate {run.path}` again"
            )
        gallery = run.gallery or {}
        return cls(
            path=run.path,
            name=run.name,
            seed=run.seed,
            recipe=run.recipe,
            provenance=run.provenance,
            metrics=run.metrics,
            outcomes=table,
            curve=run.curve,
            gallery=gallery if len(gallery.get("x", ())) else None,
            evaluation=evaluation,
        )

    @cached_property
    def protocol(self) -> Protocol:
        return Protocol(
            split=str(self.evaluation.get("split", "unknown")),
            norm=str(self.outcomes["norm"].iloc[0]),
            eps=float(self.outcomes["eps"].max()),
            attacks=tuple(sorted(self.outcomes["attack"].unique())),
            n=int(self.outcomes["index"].nunique()),
        )


@dataclass(frozen=True, eq=False)
class Verdict:
    """One recipe, judged: its runs, one per seed, and what they say together."""

    name: str
    runs: tuple[Judged, ...]

    @cached_property
    def measures(self) -> dict[str, dict[str, Any]]:
        """By measure ("clean", each attack, "worst case"): the row of `outcomes.across_seeds`."""
        rows: list[dict[Any, Any]] = self._across(outcomes.summary).to_dict("records")
        return {row["measure"]: row for row in rows}

    @cached_property
    def by_seed(self) -> pd.DataFrame:
        """`outcomes.summary` of each run, with columns recipe and seed."""
        rows = [outcomes.summary(run.outcomes).assign(recipe=self.name, seed=run.seed) for run in self.runs]
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
        return next((run.gallery for run in self.runs if run.gallery is not None), None)

    @property
    def seconds(self) -> float | None:
        """Training time of a run, in the mean over seeds; None where nothing was trained here."""
        return None if self.metrics is None else float(self.metrics.groupby("seed")["seconds"].max().mean())

    @property
    def weights(self) -> str:
        """Which weights were judged: "best" or "last"."""
        return str(self.runs[0].evaluation.get("weights", "unknown"))

    def _across(self, measure: Callable[[pd.DataFrame], pd.DataFrame]) -> pd.DataFrame:
        return outcomes.across_seeds([run.outcomes for run in self.runs], measure)


def verdicts(runs: Sequence[Run]) -> list[Verdict]:
    """The runs grouped by recipe, in order of appearance. Recipes that differ in more than seeds stay apart.

    Different recipes of one name are told apart by the folder of their first run.

    Raises:
        UnmovedError: no run; a run without evaluation; runs judged on different data, in different balls, by different
            attacks; one recipe with a seed twice, or whose seeds were judged on best weights here and last ones there.
    """
    if not runs:
        raise UnmovedError("expected at least one run, came none")
    read = [Judged.of(run) for run in runs]
    _require_alike(read)
    groups: dict[tuple[str, str], list[Judged]] = {}
    for run in read:
        recipe = json.dumps(_without_seeds(run.recipe), sort_keys=True, default=str)
        groups.setdefault((run.name, recipe), []).append(run)
    for (name, _), members in groups.items():
        seeds, paths = [run.seed for run in members], ", ".join(str(run.path) for run in members)
        if len(set(seeds)) < len(seeds):
            raise UnmovedError(f"recipe {name!r}: expected each seed once, came {seeds} in {paths}; leave one run out")
        weights = [run.evaluation.get("weights") for run in members]
        if len(set(weights)) > 1:
            raise UnmovedError(f"recipe {name!r}: seeds judged on {weights} weights in {paths}; evaluate them alike")
    names = [name for name, _ in groups]
    return [
        Verdict(name if names.count(name) == 1 else f"{name} [{members[0].path}]", tuple(members))
        for (name, _), members in groups.items()
    ]


def _require_alike(runs: Sequence[Judged]) -> None:
    first, labels = runs[0], runs[0].outcomes[["index", "label"]].drop_duplicates()
    for run in runs[1:]:
        for name, expected, came in zip(Protocol._fields, first.protocol, run.protocol, strict=True):
            if came != expected:
                raise UnmovedError(
                    f"expected runs judged alike, came {name} = {expected} in {first.path} and {came} in {run.path}; "
                    "evaluate them alike, or report on them apart"
                )
        labels = pd.concat([labels, run.outcomes[["index", "label"]]]).drop_duplicates()
        if labels["index"].duplicated().any():
            raise UnmovedError(
                f"expected runs on the same data, came other labels in {run.path} than in {first.path}; "
                "report on each data set apart"
            )


def _without_seeds(value: Any) -> Any:
    return {k: _without_seeds(v) for k, v in value.items() if k != "seed"} if isinstance(value, Mapping) else value
