"""Run the attacks of torchattacks as AutoAttack standard does, with equal budgets, to compare ours with.

    pip install --no-deps torchattacks
    python benchmarks/peer.py RUN --n 1000 --out peer.csv [--threads 1] [--alone] [--all]

100 steps, 9 targets, 5,000 queries, batches of 128, each attack from the clean image on the samples that are still
robust (``--alone``: each on all samples that are right clean). With ``AUTOATTACK=path`` of a checkout of the reference
implementation, that is run instead. One row per sample and attack in turn; seconds per attack in a .json beside it.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from unmoved.core.threat import ThreatModel
from unmoved.evaluation.judge import predict
from unmoved.runs import recipe
from unmoved.runs.assembly import Assembly
from unmoved.runs.folder import Run

BATCH = 128
NAMES = ("apgd-ce", "apgd-t", "fab-t", "square")


def load(folder: str, n: int, everything: bool = False) -> tuple[nn.Module, Any, ThreatModel]:
    """The run's best weights, n of its test images (the same that `unmoved evaluate --n` takes) and its ball.

    ``everything`` takes training images too, where the test part is small: it compares attacks, not models.
    """
    run = Run.open(Path(folder))
    assembly = Assembly(recipe.parse(run.recipe, str(run.path / "recipe.toml")))
    model = assembly.model()
    run.load_weights(model, "best")
    split = assembly.data.test
    if everything:
        images, labels = (
            torch.cat([getattr(p, a) for p in (split, assembly.data.train)]) for a in ("images", "labels")
        )
        split = replace(split, images=images, labels=labels, index=torch.arange(len(labels)))
    return model.eval(), split.take(min(n, len(split)), seed=0), assembly.threat


def torchattacks_parts(model: nn.Module, threat: ThreatModel, classes: int) -> dict[str, Callable[..., Tensor]]:
    import torchattacks

    norm = {"linf": "Linf", "l2": "L2"}[threat.norm]
    common: dict[str, Any] = {"norm": norm, "eps": threat.radius, "seed": 0}
    return {
        "apgd-ce": torchattacks.APGD(model, steps=100, n_restarts=1, loss="ce", **common),
        "apgd-t": torchattacks.APGDT(model, steps=100, n_restarts=1, n_classes=classes, **common),
        "fab-t": torchattacks.FAB(model, steps=100, n_restarts=1, multi_targeted=True, n_classes=classes, **common),
        "square": torchattacks.Square(model, n_queries=5000, resc_schedule=False, loss="margin", **common),
    }


def reference_parts(model: nn.Module, threat: ThreatModel, classes: int) -> dict[str, Callable[..., Tensor]]:
    sys.path.insert(0, os.environ["AUTOATTACK"])
    from autoattack import AutoAttack

    norm = {"linf": "Linf", "l2": "L2", "l1": "L1"}[threat.norm]
    judge = AutoAttack(model, norm=norm, eps=threat.radius, seed=0, verbose=False, device="cpu")
    judge.fab.targeted = True

    def of(attack: Any, loss: str | None = None) -> Callable[..., Tensor]:
        def run(x: Tensor, y: Tensor) -> Tensor:
            if loss is not None:
                attack.loss = loss
            attack.seed = 0
            return attack.perturb(x, y)

        return run

    return {
        "apgd-ce": of(judge.apgd, "ce"),
        "apgd-t": of(judge.apgd_targeted),
        "fab-t": of(judge.fab),
        "square": of(judge.square),
    }


def run_peer(
    model: nn.Module, split: Any, threat: ThreatModel, alone: bool = False, say: Callable[[str], None] = print
) -> tuple[pd.DataFrame, dict[str, float]]:
    """(one row per sample: index, label, by, and per attack whether it broke the sample), seconds per attack."""
    parts = (reference_parts if os.environ.get("AUTOATTACK") else torchattacks_parts)(model, threat, split.num_classes)
    batch = next(split.batches(len(split)))
    by = pd.Series([""] * len(split), dtype=object)
    left = predict(model, batch.x, batch.y) == batch.y
    right = left.clone()
    by[~left.numpy()] = "clean"
    seconds: dict[str, float] = {}
    broke = {name: torch.zeros(len(split), dtype=torch.bool) for name in NAMES}
    for name in NAMES:
        began = time.monotonic()
        for where in torch.nonzero(right if alone else left).flatten().split(BATCH):
            x, y = batch.x[where], batch.y[where]
            x_adv = parts[name](x, y).detach()
            wrong = predict(model, x_adv, y) != y
            wrong &= threat.distance(x_adv, x) <= threat.radius + threat.tolerance
            broke[name][where[wrong]] = True
            by[where[wrong & left[where]].numpy()] = name
            left[where[wrong]] = False
        seconds[name] = round(time.monotonic() - began, 2)
        say(f"{name}: {int(left.sum())} of {len(split)} robust, {seconds[name]:.1f} s")
    table = pd.DataFrame({"index": batch.index.numpy(), "label": batch.y.numpy(), "by": by})
    table = table.assign(**{name: broke[name].numpy() for name in NAMES})
    return table, seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run")
    parser.add_argument("--n", type=int, default=1000)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--alone", action="store_true", help="each attack on everything that is right clean")
    parser.add_argument("--all", action="store_true", help="training images too")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    model, split, threat = load(args.run, args.n, args.all)
    table, seconds = run_peer(model, split, threat, args.alone, say=lambda line: print(line, flush=True))
    table.to_csv(args.out, index=False)
    args.out.with_suffix(".json").write_text(
        json.dumps({"seconds": seconds, "threads": torch.get_num_threads()}), encoding="utf-8"
    )


if __name__ == "__main__":
    main()
