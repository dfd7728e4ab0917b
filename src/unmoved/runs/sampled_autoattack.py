"""Estimate robust accuracy under AutoAttack from a sample of the images that a cheap attack leaves robust."""

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
from unmoved.attacks.ensembles import distance_estimator
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
from unmoved.runs.evaluator import Evaluator
from unmoved.runs.records import Evaluation

FEWEST = 30  # survivors; with fewer, AutoAttack runs on all of them
LOOKED_AT = 32  # images on which two forward passes must agree
# Shares of the work that are done after the cheap attack and after the distance estimates; the rest is AutoAttack.
CHEAP, DISTANCE = 0.3, 0.35
Report = Callable[[float, str], None]


@dataclass(frozen=True)
class Size:
    """Set on how many survivors of the cheap attack AutoAttack runs.

    Args:
        sample: the number of survivors; with ``within``, an upper limit on it.
        within: take as many survivors as the 95 % interval needs to reach at most this many points each way.

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


def evaluate_sample(
    evaluator: Evaluator, chosen: dict[str, Attack], size: Size, report: Report
) -> dict[str, pd.DataFrame]:
    """Run a cheap attack on all images and AutoAttack on a sample of the survivors, and save the estimate.

    The estimate is of the number of these n images that are robust to both `Quick` and AutoAttack, which is never more
    than AutoAttack alone leaves robust. The outcomes of both stay in their journals, so that a larger sample or a
    complete evaluation continues from them. If the sample would hold all survivors, or there are fewer than `FEWEST`,
    AutoAttack runs on all images; if that was done before, its outcomes are returned.

    Args:
        evaluator: the run, its images and how they are evaluated.
        chosen: AutoAttack, under its name.
        size: the size of the sample.
        report: called with (share of the work done, a line of text on the state).

    Returns:
        ``{"sampled": outcomes of the cheap attack}``, or ``{"verdict": outcomes of AutoAttack}``.

    Raises:
        UnmovedError: a randomised model: two passes over the same images differ.
    """
    verdict, made = evaluator.run.verdict, evaluator.run.verdict_outcomes
    if verdict is not None and made is not None and verdict.get("question") == evaluator.digest(chosen):
        return {"verdict": made}
    began, threat, n = time.monotonic(), evaluator.assembly.threat, len(evaluator.split)
    _require_deterministic(evaluator)
    seed = evaluator.assembly.recipe.training.seed
    cheap: dict[str, Attack] = {"quick": Quick(threat, seed=seed)}
    journal = evaluator.journal("sampled", cheap)
    table = evaluator.evaluate(cheap, journal, partial(_part, report, 0.0, CHEAP))
    robust = np.flatnonzero(~_succeeded(evaluator, table, np.arange(n)))
    if len(robust) < FEWEST or (size.within is None and (size.sample or 0) >= len(robust)):
        return {"verdict": evaluator.evaluate_and_save("verdict", chosen, False, partial(_part, report, CHEAP, 1.0))}
    report(CHEAP, f"distances of {len(robust):,} survivors")
    survivors = survivors_of(
        evaluator.model, evaluator.split, threat, robust, seed, evaluator.batch_size, evaluator.workers
    )
    answers = evaluator.journal("verdict", chosen)

    def ask(design: Design, error: float) -> tuple[pd.DataFrame, Estimate]:
        among = np.concatenate(design)
        rows = evaluator.evaluate(chosen, answers, partial(_part, report, DISTANCE, 1.0), among=among)
        near_broken, far_broken = (int(_succeeded(evaluator, rows, part).sum()) for part in design)
        return rows, Estimate(n, len(robust), len(design.near), near_broken, len(design.drawn), far_broken, error)

    found = estimated(survivors, size, n, ask)
    if found is None:
        return {"verdict": evaluator.evaluate_and_save("verdict", chosen, False, partial(_part, report, DISTANCE, 1.0))}
    rows, estimate = found
    facts: Evaluation = evaluator.facts(cheap, began)
    ((name, attack),) = chosen.items()
    facts["sample"] = records.sample(estimate, repr(attack), kinds_of(name, attack, evaluator.split.num_classes))
    if size.within is not None and 100 * estimate.half_width > size.within:
        facts["notes"].append(
            f"--within {size.within:g} was not reached: with {estimate.asked} survivors asked the interval goes "
            f"{100 * estimate.half_width:.2f} points from the estimate; --sample sets how many may be asked"
        )
    evaluator.run.save_evaluation(table, facts, kind="sampled", asked=rows)
    return {"sampled": table}


def survivors_of(
    model: nn.Module,
    split: ArraySplit | Selection,
    threat: ThreatModel,
    robust: np.ndarray,
    seed: int,
    batch_size: int = 128,
    workers: int = 0,
) -> Survivors:
    """Return the survivors at these positions of the data, with the distance to the boundary that `Quick` estimates.

    Args:
        seed: keys the random draw of the sample.
    """
    estimator = distance_estimator(threat)

    def distance(model: nn.Module, batch: Batch) -> torch.Tensor:
        return estimator(model, batch).distance

    near = judge.measured(model, split, distance, threat, among=robust, batch_size=batch_size, workers=workers)
    return Survivors(robust, split.index.numpy()[robust], near, seed)


def estimated(
    survivors: Survivors, size: Size, n: int, ask: Callable[[Design, float], tuple[pd.DataFrame, Estimate]]
) -> tuple[pd.DataFrame, Estimate] | None:
    """Estimate from a sample, enlarged until the interval is short enough; return None if it needs all survivors."""
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


def _succeeded(evaluator: Evaluator, table: pd.DataFrame, position: np.ndarray) -> np.ndarray:
    """Return whether the samples at these positions of the data are misclassified or broken in a table."""
    success: np.ndarray = (
        table.set_index("index")["success"].loc[evaluator.split.index.numpy()[position]].to_numpy(bool)
    )
    return success


def _part(report: Report, first: float, last: float, share: float, words: str) -> None:
    """Report progress within a part of the work that spans the shares ``first`` to ``last`` of the whole."""
    report(first + (last - first) * share, words)


def _require_deterministic(evaluator: Evaluator) -> None:
    """Raise `UnmovedError` if two passes of the model over the same images differ."""
    batch = next(judge.checked_batches(evaluator.model, evaluator.split, LOOKED_AT, evaluator.assembly.threat))
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices):
        is_random = Evidence(evaluator.model, batch, evaluator.assembly.threat).is_random
    if is_random:
        raise UnmovedError(
            "--sample, --within: expected a model that answers alike each time, came one whose passes over the same "
            "images differ: who survives a search would be chance; use --attacks rand, without a sample"
        )
