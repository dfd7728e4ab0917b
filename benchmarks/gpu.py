"""Measure seconds per epoch on one GPU, against a plain reference in the same run: ``make bench-gpu``.

    python benchmarks/gpu.py [--steps 50] [--rounds 5] [--out runs/bench-gpu.json]
    python benchmarks/gpu.py --dry --device cpu      # every line in miniature, of no meaning as a measurement

PreActResNet-18 of full width on 50,000 random images of 32x32x3, uint8 and resident on the device, 10 attack steps at
eps 8/255, batches of 128 and 512. All variants take their turn, in ``--rounds`` rounds of ``--steps`` optimizer steps
in all; the epoch in their rows is extrapolated from these. The fastest that is strong enough then trains a whole epoch,
by which the bars are judged. The reference is ``benchmarks/reference.py`` as torch runs it by default (TF32 in
convolutions, float32 in products, contiguous, eager).
``strength`` compares the inner losses, in float32, that our attack and the reference's end at on a briefly trained
network, as a mean over starts; a variant below 0.98 reaches no bar. Then the table of ``benchmarks/training.py`` on the
device.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import reference
import torch
import training
from variants import MINIATURE, REFERENCE, VARIANTS, Side, Size, strong, taught, whole_epoch

from unmoved.runs.provenance import hardware

METHODS = ("AT", "TRADES")
STRONG = 0.98
WARM = 3


def in_turn(what: str, batch: int, size: Size, device: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """All variants on one method and batch size, a row each; one that fails says why and stops no other."""
    sides, rows = {}, []
    torch.compiler.reset()  # otherwise a second batch size would be compiled for sizes that vary
    for variant in VARIANTS:
        try:
            side = Side(variant, what, batch, size, device)
            for _ in range(WARM):
                side.step()
            sides[variant.name] = side
        except (RuntimeError, torch.OutOfMemoryError) as error:
            rows.append({"method": what, "batch": batch, "variant": variant.name, "failed": str(error).splitlines()[0]})
    for _ in range(options.rounds):
        for side in sides.values():
            side.turn(-(-options.steps // options.rounds))
    per_epoch = -(-size.images // batch)
    for name, side in sides.items():
        pairs = zip(sides[REFERENCE.name].seconds, side.seconds, strict=True)
        mean = statistics.fmean(side.seconds)
        row = {"method": what, "batch": batch, "variant": name, "seconds_per_epoch": mean * per_epoch}
        row |= {"images_per_second": batch / mean, "ratio": statistics.median(a / b for a, b in pairs)}
        rows.append(row | {"peak_mib": side.peak})
    return rows


def methods_table(device: str, pairs: int) -> Iterator[dict[str, Any]]:
    """The CPU bench's methods and networks on the device, as users get them: precision auto."""
    for name in training.NETWORKS:
        for what in reference.STEPS:
            sides = [training.Side(who, name, what, device, "auto") for who in ("ours", "reference")]
            for side in sides:
                side.step()
            times = [(sides[0].seconds(), sides[1].seconds()) for _ in range(pairs)]
            mean = statistics.fmean(ours for ours, _ in times)
            row = {"model": name, "method": what, "images_per_second": training.BATCH / mean}
            yield row | {"ratio": statistics.median(theirs / ours for ours, theirs in times)}


def bars(rows: list[dict[str, Any]], size: Size, device: str) -> list[dict[str, Any]]:
    """The bars, each with what the best variant of sufficient strength reached; seconds are those of a whole epoch."""
    seconds = [("AT", "seconds_per_epoch", 10.0), ("TRADES", "seconds_per_epoch", 12.0)]
    variants = {v.name: v for v in VARIANTS if v.layout == torch.channels_last}  # those that users get
    answers = []
    for what, measure, bar in [*seconds, ("AT", "ratio", 4.0), ("TRADES", "ratio", 4.0)]:
        lower = measure == "seconds_per_epoch"
        able = [r for r in rows if r["method"] == what and "failed" not in r and r["variant"] in variants]
        fit = [r for r in able if (r["strength"] or 0) >= STRONG]
        best = (min if lower else max)(fit, key=lambda r: r[measure], default=None)
        answer = {"method": what, "measure": measure, "bar": bar, "reached": False}
        if best is not None:
            came = best[measure]
            if lower:
                came = whole_epoch(variants[best["variant"]], what, best["batch"], size, device)
            answer |= {"came": came, "variant": best["variant"], "batch": best["batch"]}
            answer["reached"] = came <= bar if lower else came >= bar
        answers.append(answer)
    return answers


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument(
        "--steps", type=int, default=50, help="optimizer steps that are timed, at least 50 for the bars"
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--pairs", type=int, default=9, help="of the table of methods")
    parser.add_argument("--dry", action="store_true", help="every line in miniature; the figures mean nothing")
    parser.add_argument("--out", type=Path, default=Path("runs/bench-gpu.json"))
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.exit(2, "gpu.py: no GPU that torch can use; `--dry --device cpu` runs every line in miniature\n")
    size = Size()
    if options.dry:
        size, training.BATCH, training.INNER = MINIATURE, 4, 2
        options.steps, options.rounds, options.pairs = 2, 2, 1
    rows, weights = [], taught(size, options.device)
    print(f"{'step':8}{'batch':>6}  {'variant':18}{'s/epoch':>9}{'images/s':>10}{'ratio':>7}{'MiB':>8}{'strength':>10}")
    for what in METHODS:
        reached = {v.name: strong(v, what, weights, size, options.device) for v in VARIANTS if v.ours}
        for batch in size.batches:
            for row in in_turn(what, batch, size, options.device, options):
                rows.append(row | {"strength": reached.get(row["variant"])})
                print(line(rows[-1]), flush=True)
    table = []
    for row in methods_table(options.device, options.pairs):
        table.append(row)
        print(f"{row['model']:18}{row['method']:12}{row['images_per_second']:10.0f}{row['ratio']:7.2f}", flush=True)
    judged = bars(rows, size, options.device)
    for bar in judged:
        verdict = "in miniature" if options.dry else "reached" if bar["reached"] else "MISSED"
        came = (
            f"{bar['came']:.2f} ({bar['variant']}, batch {bar['batch']})" if "came" in bar else "nothing strong enough"
        )
        print(f"{bar['method']} {bar['measure']}: bar {bar['bar']:g}, came {came}: {verdict}")
    facts = {"hardware": hardware(), "versions": versions(), "size": asdict(size), "inner_steps": training.INNER}
    facts |= {"timed_steps": options.steps, "rounds": options.rounds, "miniature": options.dry}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    facts |= {"rows": rows, "methods": table, "bars": judged}
    options.out.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


def line(row: dict[str, Any]) -> str:
    head = f"{row['method']:8}{row['batch']:6}  {row['variant']:18}"
    if "failed" in row:
        return f"{head} failed: {row['failed']}"
    tail = f"{row['seconds_per_epoch']:9.2f}{row['images_per_second']:10.0f}{row['ratio']:7.2f}{row['peak_mib']:8.0f}"
    return f"{head}{tail}" + ("" if row["strength"] is None else f"{row['strength']:10.3f}")


def versions() -> dict[str, Any]:
    cuda = {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()} if torch.cuda.is_available() else {}
    return {"python": platform.python_version(), "torch": torch.__version__, **cuda}


if __name__ == "__main__":
    main()
