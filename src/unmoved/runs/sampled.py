"""Estimate AutoAttack's verdict on a run from a sample of what a cheap search leaves robust."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import pandas as pd
import torch
from torch import nn

from unmoved.attacks import Quick
from unmoved.attacks.ensembles import scout_of
from unmoved.core.batch import Batch
from unmoved.core.errors import UnmovedError, require_number, require_whole
from unmoved.core.protocols import Attack, kinds_of
from unmoved.core.threat import ThreatModel
from unmoved.data import ArraySplit, Selection
from unmoved.evaluation import judge
from unmoved.evaluation.doctor.evidence import Evidence
from unmoved.evaluation.estimate import LEVEL, Estimate, error_of_look
from unmoved.evaluation.sampling import Design, Survivors
from unmoved.runs import records
from unmoved.runs.asked import Asked
from unmoved.runs.records import Evaluation

FEWEST = 30  # survivors: of fewer all are asked
LOOKED_AT = 32  # images on which passes must agree
# Of the work: the cheap search, and then the scout; the rest is AutoAttack's.
CHEAP, SCOUT = 0.3, 0.35
Report = Callable[[float, str], None]


@dataclass(frozen=True)
class Size:
    """Say how many survivors of the cheap search AutoAttack is asked about.

    Args:
        sample: this many; with ``within``, at most about this many.
        within: as many as it takes for the 95 % interval to reach this many points each way, at most.

    Raises:
        UnmovedError: a value out of range.
    """

    sample: int | None = None
    within: float | None = None

    def __post_init__(self) -> None:
        if self.sample is not None:
            require_whole("--sample", self.sample, at_least=1)
        if self.within is not None:
            require_number("--within", self.within, above=0, at_most=100)


def answer(asked: Asked, chosen: dict[str, Attack], size: Size, report: Report) -> dict[str, pd.DataFrame]:
    """Run a cheap search on all images, ask AutoAttack about a sample of the survivors, and save the estimate.

    What is estimated is what `Quick` and AutoAttack together leave of these n images, never more than AutoAttack alone
    leaves. The answers of both stay in their journals: a larger sample and a complete verdict go on from there. Where
    the sample is not smaller than the survivors, or these are fewer than `FEWEST`, the complete verdict is made; where
    it is there already, it is returned.

    Args:
        asked: the run, its images and how they are judged.
        chosen: AutoAttack by its name.
        size: of the sample.
        report: called with (share of the work, what is known so far).

    Returns:
        ``{"sampled": outcomes of the cheap search}``, or ``{"verdict": outcomes of AutoAttack}``.

    Raises:
        UnmovedError: a model whose passes differ.
    """
    verdict, made = asked.run.verdict, asked.run.verdict_outcomes
    if verdict is not None and made is not None and verdict.get("question") == asked.digest(chosen):
        return {"verdict": made}
    began, threat, n = time.monotonic(), asked.assembly.threat, len(asked.split)
    _require_deterministic(asked)
    seed = asked.assembly.recipe.training.seed
    cheap: dict[str, Attack] = {"quick": Quick(threat, seed=seed)}
    journal = asked.journal("sampled", cheap)
    table = asked.judged(cheap, journal, partial(_part, report, 0.0, CHEAP))
    standing = np.flatnonzero(~_succeeded(asked, table, np.arange(n)))
    if len(standing) < FEWEST or (size.within is None and (size.sample or 0) >= len(standing)):
        return {"verdict": asked.answer("verdict", chosen, False, partial(_part, report, CHEAP, 1.0))}
    report(CHEAP, f"how near {len(standing):,} survivors are")
    survivors = survivors_of(asked.model, asked.split, threat, standing, seed, asked.batch_size, asked.workers)
    answers = asked.journal("verdict", chosen)

    def ask(design: Design, error: float) -> tuple[pd.DataFrame, Estimate]:
        among = np.concatenate(design)
        rows = asked.judged(chosen, answers, partial(_part, report, SCOUT, 1.0), among=among)
        near_broken, far_broken = (int(_succeeded(asked, rows, part).sum()) for part in design)
        return rows, Estimate(n, len(standing), len(design.near), near_broken, len(design.drawn), far_broken, error)

    found = estimated(survivors, size, n, ask)
    if found is None:
        return {"verdict": asked.answer("verdict", chosen, False, partial(_part, report, SCOUT, 1.0))}
    rows, estimate = found
    facts: Evaluation = asked.facts(cheap, began)
    ((name, attack),) = chosen.items()
    facts["sample"] = records.sample(estimate, repr(attack), kinds_of(name, attack, asked.split.num_classes))
    if size.within is not None and 100 * estimate.half_width > size.within:
        facts["notes"].append(
            f"--within {size.within:g} was not reached: with {estimate.asked} survivors asked the interval goes "
            f"{100 * estimate.half_width:.2f} points from the estimate; --sample sets how many may be asked"
        )
    asked.run.save_evaluation(table, facts, kind="sampled", asked=rows)
    return {"sampled": table}


def survivors_of(
    model: nn.Module,
    split: ArraySplit | Selection,
    threat: ThreatModel,
    standing: np.ndarray,
    seed: int,
    batch_size: int = 128,
    workers: int = 0,
) -> Survivors:
    """Return the survivors at these positions of the data, with how near each is by the word of `quick`'s scout.

    Args:
        seed: of the draw.
    """
    scout = scout_of(threat)

    def reach(model: nn.Module, batch: Batch) -> torch.Tensor:
        return scout(model, batch).reach

    near = judge.measured(model, split, reach, threat, among=standing, batch_size=batch_size, workers=workers)
    return Survivors(standing, split.index.numpy()[standing], near, seed)


def estimated(
    survivors: Survivors, size: Size, n: int, ask: Callable[[Design, float], tuple[pd.DataFrame, Estimate]]
) -> tuple[pd.DataFrame, Estimate] | None:
    """Ask about a sample, a larger one until the interval is as short as wanted; None where all are to be asked."""
    most = len(survivors) if size.sample is None else size.sample
    if size.within is None:
        return ask(survivors.design(most), 1 - LEVEL)
    within, look, broken, asked = size.within / 100, 0, 0, 0
    while True:
        error = error_of_look(look)
        asked = min(max(asked + 1, survivors.smallest(within, n, broken, error)), most)
        if asked >= len(survivors):
            return None
        rows, estimate = ask(survivors.design(asked), error)
        if estimate.half_width <= within or asked == most:
            return rows, estimate
        look, broken = look + 1, estimate.far_broken


def _succeeded(asked: Asked, table: pd.DataFrame, position: np.ndarray) -> np.ndarray:
    """Return whether the samples at these positions of the data are misclassified or broken in a table."""
    success: np.ndarray = table.set_index("index")["success"].loc[asked.split.index.numpy()[position]].to_numpy(bool)
    return success


def _part(report: Report, first: float, last: float, share: float, words: str) -> None:
    """Report a share of one part of the work, from ``first`` to ``last``, as a share of the whole."""
    report(first + (last - first) * share, words)


def _require_deterministic(asked: Asked) -> None:
    """Raise `UnmovedError` where two passes of the model over the same images differ."""
    batch = next(judge.checked_batches(asked.model, asked.split, LOOKED_AT, asked.assembly.threat))
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices):
        is_random = Evidence(asked.model, batch, asked.assembly.threat).is_random
    if is_random:
        raise UnmovedError(
            "--sample, --within: expected a model that answers alike each time, came one whose passes over the same "
            "images differ: who survives a search would be chance; use --attacks rand, without a sample"
        )
