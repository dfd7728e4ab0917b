"""Measure accuracy against eps and collect example images, for the report of an evaluation."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

import numpy as np
import pandas as pd
import torch
from torch import nn

from unmoved.core.errors import UnmovedError, require_whole
from unmoved.core.protocols import Attack, Split
from unmoved.core.threat import ThreatModel, with_threat
from unmoved.evaluation import judge

CURVE_SHARES = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0)


def curve(
    model: nn.Module,
    split: Split,
    attack: Attack,
    threat: ThreatModel,
    eps: Sequence[float],
    *,
    name: str = "pgd",
    batch_size: int = 128,
    workers: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> pd.DataFrame:
    """Run one attack at several radii, replacing its threat model at each, and return the outcomes.

    Raises:
        UnmovedError: an attack that is not a dataclass with a ``threat`` field.
    """
    tables = []
    for done, radius in enumerate(eps):
        ball = dataclasses.replace(threat, eps=radius)
        ours = with_threat(attack, ball)
        if ours is None:
            raise UnmovedError(f"curve: expected an attack with a threat field, came {attack!r}")
        tables.append(judge.evaluate(model, split, {name: ours}, ball, batch_size=batch_size, workers=workers))
        if progress is not None:
            progress(done + 1, len(eps))
    return pd.concat(tables, ignore_index=True)


def gallery(
    model: nn.Module,
    split: Split,
    attack: Attack,
    threat: ThreatModel,
    count: int = 8,
    name: str = "attack",
    table: pd.DataFrame | None = None,
) -> dict[str, np.ndarray]:
    """Attack some samples that the model gets right; return arrays that `unmoved.Run` saves.

    Args:
        table: outcomes of the attack of this name. The gallery shows samples that it broke, some of each class; without
            a table or broken samples, the first of the split.
    """
    parts: list[dict[str, np.ndarray]] = []
    missing = count = require_whole("count", count, at_least=1)
    broken = [] if table is None else broken_by(table, name)
    wanted = torch.tensor(broken[:count], dtype=torch.int64)
    for batch in judge.checked_batches(model, split, 4 * count, threat):
        if len(wanted):
            batch = batch.take(torch.isin(batch.index.cpu(), wanted).to(batch.index.device))
            if len(batch) == 0:
                continue
        clean = judge.predict(model, batch.x, batch.y)
        chosen = torch.nonzero(clean == batch.y).flatten()[:missing]
        if len(chosen) == 0:
            continue
        taken = batch.take(chosen)
        proposal = judge.propose(model, attack, taken, threat, name)
        parts.append(
            {
                "x": taken.x.cpu().numpy(),
                "x_adv": proposal.cpu().numpy(),
                "label": taken.y.cpu().numpy(),
                "clean_prediction": clean[chosen].cpu().numpy(),
                "adversarial_prediction": judge.predict(model, proposal, taken.y).cpu().numpy(),
                "attack": np.array([name] * len(taken)),
            }
        )
        missing -= len(taken)
        if missing == 0:
            break
    if not parts:
        return {}
    return {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}


def broken_by(table: pd.DataFrame, attack: str) -> list[int]:
    """Return the identities of the samples that were right and that an attack broke, from each class in turn."""
    won = (table["attack"] == attack) & table["success"] & (table["clean_prediction"] == table["label"])
    rows = table[won].sort_values("index")
    rows = rows.assign(turn=rows.groupby("label").cumcount()).sort_values(["turn", "index"])
    return [int(index) for index in rows["index"]]


def radii(threat: ThreatModel) -> list[float]:
    """Return the radii at which the curve is measured: multiples of eps; for linf within the box of valid images."""
    largest = threat.bounds[1] - threat.bounds[0] if threat.norm == "linf" else math.inf
    return sorted({min(share * threat.radius, largest) for share in CURVE_SHARES})
