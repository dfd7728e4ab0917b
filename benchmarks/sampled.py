"""Check the intervals of sampled verdicts against complete verdicts made before, and compare their cost.

    unmoved evaluate RUN --attacks standard --n 1000            # the complete verdict, for each run
    python benchmarks/sampled.py coverage RUN... [--sample 200] [--draws 1000]
    python benchmarks/sampled.py coverage RUN... --within 1 [--draws 1000]
    python benchmarks/sampled.py speed RUN [--within 0.5] [--n N] [--keep FOLDER]

``coverage``: the cheap attack and the distance estimate run once; each draw is a sampled verdict whose outcomes are
read from the complete one. Prints one line of JSON per run: the share of intervals that hold the number that both
attacks together leave, the mean of the estimates beside it, how far the intervals reach, how many images were sampled.
``speed``: a sampled verdict and then a complete one, both from nothing and one after the other, in copies of the run
folder, which ``--keep`` leaves in a folder.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from unmoved.attacks import Quick
from unmoved.evaluation import judge
from unmoved.evaluation.estimate import LEVEL, Estimate
from unmoved.evaluation.sampling import Design
from unmoved.runs import records, sampled_autoattack
from unmoved.runs.evaluate import evaluate_run
from unmoved.runs.folder import Run
from unmoved.runs.load import opened
from unmoved.runs.provenance import hardware


def coverage(folder: Path, size: sampled_autoattack.Size, draws: int) -> dict[str, object]:
    """Draw many sampled verdicts of a run, and compare each with its complete verdict."""
    run = Run.open(folder)
    complete = run.verdict_outcomes
    if complete is None:
        raise SystemExit(f"{folder}: no complete verdict; run `unmoved evaluate {folder} --attacks standard` first")
    complete = complete.set_index("index")
    assembly, model = opened(run, "best", "auto", ())
    test, seed = assembly.data.test, assembly.recipe.training.seed
    split = test.lent(torch.from_numpy(np.isin(assembly.data.index("test").cpu().numpy(), complete.index)))
    began = time.monotonic()
    cheap = judge.evaluate(model, split, {"quick": Quick(assembly.threat, seed=seed)}, assembly.threat, workers=0)
    identities = split.index.numpy()
    standing = np.flatnonzero(np.isin(identities, cheap.loc[~cheap["success"], "index"]))
    survivors = sampled_autoattack.survivors_of(model, split, assembly.threat, standing, seed)
    seconds = time.monotonic() - began
    breaks = complete.loc[identities, "success"].to_numpy(bool)
    n, left = len(split), len(standing) - int(breaks[standing].sum())
    found: list[Estimate] = []
    for draw in range(draws):
        drawn = sampled_autoattack.estimated(
            replace(survivors, seed=1 + draw), size, n, _asked(breaks, n, len(standing))
        )
        found += [] if drawn is None else [drawn[1]]
    return {
        "run": run.name,
        "n": n,
        "clean": int((complete["clean_prediction"] == complete["label"]).sum()),
        "quick": len(standing),
        "standard": int((~complete["success"]).sum()),
        "both": left,
        "quick_seconds": round(seconds, 1),
        **_held(found, left, n, draws),
    }


def _asked(breaks: np.ndarray, n: int, survivors: int) -> Callable[[Design, float], tuple[pd.DataFrame, Estimate]]:
    """Return a function that reads the outcomes of a design from a complete verdict."""

    def ask(design: Design, error: float) -> tuple[pd.DataFrame, Estimate]:
        near, far = (int(breaks[part].sum()) for part in design)
        return pd.DataFrame(), Estimate(n, survivors, len(design.near), near, len(design.drawn), far, error)

    return ask


def _held(found: list[Estimate], left: int, n: int, draws: int) -> dict[str, object]:
    """Summarise estimates; a draw of all survivors is exact."""
    exact = draws - len(found)
    holds = sum(low <= left <= high for low, high in (estimate.interval for estimate in found))
    mean = (sum(estimate.left for estimate in found) + exact * left) / draws
    reach = [100 * estimate.half_width for estimate in found] + [0.0] * exact
    return {
        "draws": draws,
        "coverage": (holds + exact) / draws,
        "bias_points": round(100 * (mean - left) / n, 3),
        "reach_points": [round(float(q), 2) for q in np.quantile(reach, (0.5, 0.95))],
        "asked": float(np.mean([estimate.asked for estimate in found])) if found else left,
        "exact": exact,
    }


def speed(folder: Path, size: sampled_autoattack.Size, n: int | None, keep: Path | None) -> dict[str, object]:
    """Time a sampled verdict, and the complete one after it, from nothing."""
    seconds: dict[str, float] = {}
    with tempfile.TemporaryDirectory() if keep is None else nullcontext(keep) as scratch:
        runs = {}
        for kind, settings in (("sampled", {"sample": size.sample, "within": size.within}), ("complete", {})):
            run = Run.open(shutil.copytree(folder, Path(scratch) / kind))
            for old in ("verdict", "sampled"):
                shutil.rmtree(run.path / old, ignore_errors=True)
            began = time.monotonic()
            evaluate_run(run, attacks="standard", n=n, **settings)
            seconds[kind], runs[kind] = time.monotonic() - began, run
            print(f"{folder}: {kind} in {seconds[kind]:.1f} s", file=sys.stderr, flush=True)
        estimate, complete = records.estimate(runs["sampled"].sampled), runs["complete"].verdict_outcomes
    assert complete is not None
    return {
        "run": str(folder),
        "n": len(complete),
        "estimate": None if estimate is None else estimate.words(),
        "interval": None if estimate is None else [100 * count / estimate.n for count in estimate.interval],
        "complete": int((~complete["success"]).sum()),
        "seconds": {kind: round(value, 1) for kind, value in seconds.items()},
        "ratio": round(seconds["complete"] / seconds["sampled"], 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("coverage", "speed"))
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--sample", type=int)
    parser.add_argument("--within", type=float)
    parser.add_argument("--draws", type=int, default=1000)
    parser.add_argument("--n", type=int)
    parser.add_argument("--keep", type=Path, help="speed: where the judged copies stay; a folder that is empty or new")
    args = parser.parse_args()
    if args.sample is None and args.within is None:
        args.sample, args.within = (200, None) if args.what == "coverage" else (None, 0.5)
    size = sampled_autoattack.Size(args.sample, args.within)
    for folder in args.runs:
        row = coverage(folder, size, args.draws) if args.what == "coverage" else speed(folder, size, args.n, args.keep)
        print(json.dumps({**row, "level": LEVEL, "torch": torch.__version__, **hardware()}), flush=True)


if __name__ == "__main__":
    main()
