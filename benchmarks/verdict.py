"""Compare our AutoAttack with the equal-budget peer (`peer.py`), in strength and speed: ``make bench-verdict``.

    python benchmarks/verdict.py speed RUN [--n 128]      standard, quick and the peer in turn, as ratios
    python benchmarks/verdict.py strength RUN --peer peer.csv [--n 1000] [--alone] [--all]

``peer.csv`` comes from benchmarks/peer.py. Verdicts of whole runs on the same images, in float32.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pandas as pd
import peer
import torch

from unmoved.attacks import AutoAttack, Quick
from unmoved.evaluation.judge import evaluate
from unmoved.runs.provenance import hardware


def ours(model: Any, split: Any, threat: Any, attack: Any) -> tuple[pd.DataFrame, float, dict[str, float]]:
    """(outcomes, seconds, seconds per part)."""
    began = last = time.monotonic()
    parts: dict[str, float] = {}

    def note(done: float, total: float, words: str) -> None:
        nonlocal last
        name, now = words.split(":")[0], time.monotonic()
        parts[name] = round(parts.get(name, 0.0) + now - last, 2)
        last = now

    model.to(memory_format=torch.channels_last)
    table = evaluate(model, split, {"a": attack}, threat, batch_size=peer.BATCH, workers=0, progress=note)
    model.to(memory_format=torch.contiguous_format)
    return table, time.monotonic() - began, parts


def peer_alone(run: str, n: int, threads: int) -> tuple[pd.DataFrame, dict[str, float], float]:
    """(outcomes, seconds per attack, seconds) of the peer."""
    torch.set_num_threads(threads)
    model, split, threat = peer.load(run, n)
    began = time.monotonic()
    theirs, seconds = peer.run_peer(model, split, threat)
    return theirs, seconds, time.monotonic() - began


def speed(args: argparse.Namespace) -> dict[str, Any]:
    """Ours before and after the peer, so that a machine that slows down does not favour either."""
    model, split, threat = peer.load(args.run, args.n)
    quick, quick_seconds, _ = ours(model, split, threat, Quick(threat))
    standard, first, parts = ours(model, split, threat, AutoAttack(threat))
    # In a process of its own: ours changes how this one keeps memory, for whoever comes after, too.
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
        asked = process.submit(peer_alone, args.run, args.n, torch.get_num_threads())
        theirs, seconds, peer_seconds = asked.result()
    _, second, _ = ours(model, split, threat, AutoAttack(threat))
    _, quick_again, _ = ours(model, split, threat, Quick(threat))
    return {
        "n": len(split),
        "clean": float((theirs["by"] != "clean").mean()),
        "robust": {
            "peer": int((theirs["by"] == "").sum()),
            "standard": int((~standard["success"]).sum()),
            "quick": int((~quick["success"]).sum()),
        },
        "seconds": {
            "peer": round(peer_seconds, 1),
            "standard": [round(first, 1), round(second, 1)],
            "quick": [round(quick_seconds, 2), round(quick_again, 2)],
        },
        "peer per attack": seconds,
        "standard per attack": parts,
        "ratio": {
            "standard": round(peer_seconds / ((first + second) / 2), 2),
            "quick": round(peer_seconds / ((quick_seconds + quick_again) / 2), 1),
        },
    }


def strength(args: argparse.Namespace) -> dict[str, Any]:
    """Samples left robust by each, in all and (``--alone``) by each attack on its own."""
    model, split, threat = peer.load(args.run, args.n, args.all)
    theirs = pd.read_csv(args.peer, keep_default_na=False)
    table, seconds, _ = ours(model, split, threat, AutoAttack(threat))
    quick, quick_seconds, _ = ours(model, split, threat, Quick(threat))
    if theirs["index"].sort_values().tolist() != table["index"].tolist():
        raise SystemExit(f"{args.peer}: holds other images than {args.run} with --n {args.n}")
    stands = {"peer": int((theirs["by"] == "").sum()), "standard": int((~table["success"]).sum())}
    found: dict[str, Any] = {
        "n": len(split),
        "clean": int((table["by"] != "clean").sum()),
        "robust": stands | {"quick": int((~quick["success"]).sum())},
        "broken by": {
            "peer": theirs["by"].value_counts().to_dict(),
            "standard": table["by"].value_counts().to_dict(),
            "quick": quick["by"].value_counts().to_dict(),
        },
        "seconds": {"standard": round(seconds, 1), "quick": round(quick_seconds, 1)},
    }
    if args.alone:
        right = (table["by"] != "clean").sum()
        found["robust alone"] = {
            name: {
                "peer": int(right - theirs[name].sum()),
                "ours": int((~ours(model, split, threat, attack)[0]["success"]).sum()),
            }
            for name, attack in AutoAttack(threat).parts(split.num_classes).items()
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("speed", "strength"))
    parser.add_argument("run")
    parser.add_argument("--n", type=int)
    parser.add_argument("--peer", type=Path)
    parser.add_argument("--alone", action="store_true")
    parser.add_argument("--all", action="store_true")
    parser.add_argument("--threads", type=int, default=0)
    args = parser.parse_args()
    args.n = args.n or (128 if args.what == "speed" else 1000)
    if args.threads:
        torch.set_num_threads(args.threads)
    found = (speed if args.what == "speed" else strength)(args)
    print(json.dumps({"run": args.run, **found, "torch": torch.__version__, **hardware()}, indent=2))


if __name__ == "__main__":
    main()
