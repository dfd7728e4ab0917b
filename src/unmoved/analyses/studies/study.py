"""Prepare runs for a study, comparable and with their models, and save what it found."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import pandas as pd
import torch
from torch import nn

from unmoved.analyses.studies.table_cache import TableCache
from unmoved.core.errors import UnmovedError, require_whole
from unmoved.data import ArraySplit, DataSet
from unmoved.evaluation.outcomes import CLEAN, WORST, by_sample
from unmoved.reports import pages
from unmoved.reports.drawing import short_names
from unmoved.reports.pages import Section
from unmoved.runs.assembly import Assembly
from unmoved.runs.evaluated import EvaluatedRun, on_replaced_data, require_same_samples, samples_of
from unmoved.runs.folder import Run
from unmoved.runs.load import Opened, data_and_code, opened, weights_digest

Progress = Callable[[float, str], None]


@dataclass(frozen=True, eq=False)
class AnalysedRun:
    """Hold a run under study: its model on the device, and the images that it is studied on.

    Attributes:
        name: the recipe's name, with the seed or folder if several runs of one recipe are studied.
        key: what every table made from this model and these images depends on, for `cache`.
        cache: the cache of its tables, in the run's folder.
    """

    name: str
    run: Run
    assembly: Assembly
    model: nn.Module
    split: ArraySplit
    key: dict[str, object]

    @property
    def cache(self) -> TableCache:
        return TableCache(self.run.path / "analysis")

    @property
    def training_eps(self) -> float:
        """Return the radius of the last phase's attack; 0 without an attack, or if the model was trained elsewhere."""
        if not self.assembly.recipe.trained:
            return 0.0
        epochs = self.assembly.recipe.training.epochs
        attack = self.assembly.phases.at(epochs, epochs).attack
        threat = getattr(attack, "threat", None)
        return 0.0 if threat is None else float(threat.radius)


@dataclass(frozen=True, eq=False)
class Study:
    """Hold what an analysis found: tables by name (one observation a row), sentences, and the sections of a page.

    Attributes:
        n: test images.
        runs: the folders of the runs.
        settings: all other settings, so that it can be repeated.
    """

    name: str
    title: str
    tables: Mapping[str, pd.DataFrame]
    sentences: Sequence[str]
    sections: Sequence[Section]
    n: int
    runs: Sequence[str]
    settings: Mapping[str, object]

    def write(self, out: Path) -> Path:
        """Save ``out/<name>/``: a CSV file per table, verdict.json, index.html with its figures; return the page.

        Raises:
            UnmovedError: a folder that cannot be written.
        """
        folder = out / self.name
        files = {f"{name}.csv": table.to_csv(index=False).encode() for name, table in self.tables.items()}
        facts = {
            "verdict": self.sentences,
            "settings": {"n": self.n, "runs": self.runs, **self.settings},
            "versions": {"unmoved": metadata.version("unmoved"), "torch": torch.__version__},
        }
        files["verdict.json"] = (json.dumps(facts, indent=2) + "\n").encode()
        lead = f"{len(self.runs)} run{'s' if len(self.runs) != 1 else ''}, n = {self.n} test images"
        return pages.write_sections(folder / "index.html", self.title, self.sections, lead=lead, beside=files)


def subjects(
    runs: Sequence[Run],
    n: int | None,
    *,
    weights: str = "best",
    device: str = "auto",
    allow: Collection[str] = (),
    ready: Callable[[], Opened] | None = None,
) -> list[AnalysedRun]:
    """Open runs that may be studied together, each with the same n test images (all, where there are fewer).

    Args:
        ready: as in `unmoved.runs.evaluate.evaluate_run`, where there is one run.

    Raises:
        UnmovedError: one run twice; runs on other data, classes or in other balls; a run without weights.
    """
    n = None if n is None else require_whole("n", n, at_least=1)
    paths = [run.path.resolve() for run in runs]
    for path in paths:
        if paths.count(path) > 1:
            raise UnmovedError(f"expected each run once, came {path} twice")
    analysed: list[AnalysedRun] = []
    read: dict[str, _Read] = {}
    for run, name in zip(runs, names_of(runs), strict=True):
        asked = json.dumps(run.recipe.get("data"), sort_keys=True, default=str)
        held = read.get(asked)
        source = None if held is None else held.source
        assembly, model = opened(run, weights, device, allow, source=source) if ready is None else ready()
        if held is None:
            test = assembly.data.test
            split = test if n is None else test.take(min(n, len(test)), seed=0)
            read[asked] = held = _Read(assembly.source, split)
        if analysed:
            _require_alike(analysed[0], run, assembly, held.split)
            if held.split.digest == analysed[0].split.digest:  # the same images, in files of other names
                read[asked] = held = held._replace(split=analysed[0].split)
        key: dict[str, object] = {"weights": weights_digest(run, weights)}
        key |= data_and_code(assembly, held.split, allow)
        analysed.append(AnalysedRun(name, run, assembly, model, held.split, key))
    return analysed


class _Read(NamedTuple):
    """Hold the data and split that runs on the same data share."""

    source: DataSet
    split: ArraySplit


def names_of(runs: Sequence[Run]) -> list[str]:
    """Return the recipes' names, without a folder that all share; with the seed where one recipe has several runs.

    If that is not enough, the run's folder is added, so that no two names are the same.
    """
    short = short_names([run.name for run in runs])
    plain = [short[run.name] for run in runs]
    seeded = [
        name if plain.count(name) == 1 else f"{name} seed {run.seed}" for name, run in zip(plain, runs, strict=True)
    ]
    return [name if seeded.count(name) == 1 else f"{name} [{run.path}]" for name, run in zip(seeded, runs, strict=True)]


def _require_alike(first: AnalysedRun, run: Run, assembly: Assembly, split: ArraySplit) -> None:
    theirs, ours = first.assembly, assembly
    if theirs.data.classes != ours.data.classes or theirs.shape != ours.shape:
        raise UnmovedError(
            f"expected runs on the same data, came {first.run.path} with {len(theirs.data.classes)} classes of images "
            f"{theirs.shape} and {run.path} with {len(ours.data.classes)} of {ours.shape}; study each data set apart"
        )
    require_same_samples(_samples(first.split), _samples(split), (first.run.path, run.path))
    same_images = split is first.split or (
        torch.equal(split.index, first.split.index) and torch.equal(split.images, first.split.images)
    )
    if not same_images:
        raise UnmovedError(
            f"expected runs on the same data, came {first.run.path} and {run.path}, whose test images differ under "
            "the same identities; study each data set apart"
        )
    if theirs.threat != ours.threat:
        raise UnmovedError(
            f"expected runs in one ball, came {theirs.threat!r} in {first.run.path} and {ours.threat!r} in {run.path}; "
            "study each ball apart"
        )


def _samples(split: ArraySplit) -> pd.DataFrame:
    return pd.DataFrame({"index": split.index.cpu().numpy(), "label": split.labels.cpu().numpy()})


def accuracies(runs: Sequence[AnalysedRun]) -> tuple[dict[str, tuple[float, float]], str] | None:
    """Return by name (clean, robust) accuracy of the evaluations that all have alike, and what judged them; or None.

    AutoAttack's verdicts if every run has one on as many images, otherwise the worst case of the evaluations; a sampled
    verdict does not say which images AutoAttack leaves.
    """
    judged = answers(runs)
    if judged is None:
        return None
    tables, source = judged
    return {name: (float(t[CLEAN].mean()), float(t[WORST].mean())) for name, t in tables.items()}, source


def answers(runs: Sequence[AnalysedRun]) -> tuple[dict[str, pd.DataFrame], str] | None:
    """Return by name `outcomes.by_sample` of what judged all runs on the same images, and what that is; or None."""
    judged = [one for one in runs if any(one.run.facts(kind) for kind in ("evaluation", "verdict", "sampled"))]
    evaluated = [EvaluatedRun.of(one.run) for one in judged]
    if on_replaced_data(evaluated) is not None:
        return None
    for source, tables in (
        ("AutoAttack", [one.autoattack for one in evaluated if one.autoattack is not None]),
        ("", [one.outcomes for one in evaluated]),
    ):
        attacks = {tuple(sorted(set(table["attack"]))) for table in tables}
        if len(tables) < len(runs) or len(attacks) > 1:
            continue
        if all(samples_of(table).equals(samples_of(tables[0])) for table in tables[1:]):
            samples = [by_sample(table, is_checked=True).sort_values("index", ignore_index=True) for table in tables]
            by_name = {one.name: table for one, table in zip(runs, samples, strict=True)}
            return by_name, source or ", ".join(next(iter(attacks)))
    return None


def joined(tables: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """Concatenate the tables of several runs, given by name, with the name in the column ``run``."""
    return pd.concat([table.assign(run=name) for name, table in tables.items()], ignore_index=True)


def folders(runs: Sequence[AnalysedRun]) -> list[str]:
    """Return the folder of each run."""
    return [str(subject.run.path) for subject in runs]


def part_of(progress: Progress, k: int, of: int) -> Progress:
    """Return the progress of the k-th of several equal parts."""
    return lambda share, words: progress((k + share) / of, words)


def no_progress(share: float, words: str) -> None:
    """Ignore the progress: the default of ``progress``."""
