"""Measure the cost of adversarial training per image and step, over attack steps, passes, image size and processes.

    python benchmarks/scale.py [--device cpu] [--images 4] [--repeats 3]

Part 1: WideResNet-34-10, per image at 32x32 and 64x64: operations, bytes that a backward pass keeps, seconds of an
attack step (forward, gradient by the image) and of a training pass (forward, gradient by the weights).
Part 2: seconds of one step of AT against the number of attack steps, a straight line fitted through them.
Part 3: methods that make several passes, in units of AT with as many attack steps.
Part 4: one process with a batch, on one core and on two, against two with half of it each (DDP over gloo, a core
each), and the exchange of gradients alone.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from training import BATCH, Flops, method, network

from unmoved import Batch, Method, ThreatModel, attacks, models, terms, train, train_step
from unmoved.data import ArraySplit
from unmoved.runs.provenance import hardware
from unmoved.training import distributed
from unmoved.training.optim import SGD

STEPS = (1, 2, 5, 10, 20)


def seconds(act: Callable[[], Any], repeats: int, device: str) -> float:
    """The median of some repetitions, after one that warms up."""
    times = []
    for _ in range(repeats + 1):
        if device == "cuda":
            torch.cuda.synchronize()
        began = time.perf_counter()
        act()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return statistics.median(times[1:])


def kept_bytes(model: nn.Module, x: torch.Tensor) -> int:
    """What the graph of a forward pass holds for its backward pass, without the weights."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    held: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            held[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = model(x)
    del out
    return sum(held.values())


def costs(side: int, images: int, repeats: int, device: str) -> dict[str, float]:
    """WideResNet-34-10 on images of side x side pixels; all figures are per image."""
    torch.manual_seed(0)
    model = models.wide_resnet((3, side, side), 10, depth=34, width=10).to(device)
    model = model.to(memory_format=torch.channels_last)
    x = torch.rand(images, 3, side, side, device=device)
    y = torch.zeros(images, dtype=torch.int64, device=device)

    def attack() -> None:
        at = x.clone().requires_grad_()
        torch.autograd.grad(nn.functional.cross_entropy(model(at), y), at)

    def training() -> None:
        model.zero_grad(set_to_none=True)
        nn.functional.cross_entropy(model(x), y).backward()

    found: dict[str, float] = {}
    for name, act, mode in (("attack_step", attack, False), ("training_pass", training, True)):
        model.train(mode).requires_grad_(mode)
        with Flops() as counter:
            act()
        found[f"{name}_flop"] = counter.total / images
        found[f"{name}_seconds"] = seconds(act, repeats, device) / images
    found["kept_bytes"] = kept_bytes(model, x) / images
    found["parameters"] = sum(p.numel() for p in model.parameters())
    return found


def one_step(how: Method, repeats: int, device: str) -> float:
    """Seconds of one training step on PreActResNet-18 of width 16."""
    model = network("preact_resnet18", device, torch.channels_last).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    batch = Batch(torch.rand(BATCH, 3, 32, 32, device=device), torch.zeros(BATCH, dtype=torch.int64, device=device))
    return seconds(lambda: train_step(model, how, optimizer, batch), repeats, device)


def by_steps(repeats: int, device: str) -> dict[str, Any]:
    """One step of AT on PreActResNet-18 of width 16 with k attack steps; seconds = a + b k by least squares."""
    hows = [Method(attacks.PGD(ThreatModel("linf", 8 / 255), steps=k), terms.CE()) for k in STEPS]
    rounds = [[one_step(how, 1, device) for how in hows] for _ in range(repeats)]  # in turn: the machine's speed drifts
    times = [statistics.median(column) for column in zip(*rounds, strict=True)]
    k, t = torch.tensor(STEPS, dtype=torch.float64), torch.tensor(times, dtype=torch.float64)
    slope = float(((k - k.mean()) * (t - t.mean())).sum() / ((k - k.mean()) ** 2).sum())
    start = float(t.mean() - slope * k.mean())
    residual = float(((t - start - slope * k) ** 2).sum() / ((t - t.mean()) ** 2).sum())
    return {"steps": STEPS, "seconds": times, "start": start, "per_step": slope, "r2": 1 - residual}


def by_method(repeats: int, device: str) -> dict[str, float]:
    """Seconds of a step of each method with 10 attack steps, in units of AT's; median of ratios taken in turn."""

    def once(what: str) -> float:
        return one_step(method(what, 8 / 255), 1, device)

    found = {}
    for what in ("TRADES", "MART", "TRADES-AWP", "APD"):
        found[what] = statistics.median(once(what) / once("AT") for _ in range(repeats))
    return found


WORKER = "--worker"


def epoch(out: Path, samples: int, threads: int) -> None:
    """One of several processes: seconds of an epoch of AT after one that warms up, and of one exchange of gradients."""
    torch.set_num_threads(threads)
    fabric = distributed.prepare("cpu")
    with distributed.together(fabric):
        made = torch.Generator().manual_seed(0)
        images = torch.randint(0, 256, (samples, 3, 32, 32), dtype=torch.uint8, generator=made)
        split = ArraySplit.of(images, torch.randint(0, 10, (samples,), generator=made))
        model = network("preact_resnet18", "cpu")
        at = Method(attacks.PGD(ThreatModel("linf", 8 / 255), steps=10), terms.CE())
        log = train(model, at, split, epochs=2, batch_size=BATCH, optimizer=SGD(lr=0.0), fabric=fabric)
        gradients = torch.zeros(sum(p.numel() for p in model.parameters()))
        exchange = seconds(lambda: distributed.summed(fabric, gradients), 5, "cpu")
    if distributed.rank() == 0:
        facts = {"epoch": log[1]["seconds"] - log[0]["seconds"], "exchange": exchange, "numbers": len(gradients)}
        out.write_text(json.dumps(facts), encoding="utf-8")


def by_processes(folder: Path, samples: int, repeats: int) -> dict[str, Any]:
    """Processes x threads: one on one core, one on two, two on a core each; medians of rounds taken in turn."""
    shapes = ((1, 1), (1, 2), (2, 1))
    rows: dict[str, list[dict[str, float]]] = {f"{count} x {threads}": [] for count, threads in shapes}
    out = folder / "scale-part.json"
    for count, threads in shapes * repeats:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}", __file__]
        environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
        subprocess.run([*command, WORKER, str(out), str(samples), str(threads)], check=True, env=environment)
        rows[f"{count} x {threads}"].append(json.loads(out.read_text(encoding="utf-8")))
        out.unlink()
    return {
        name: {key: statistics.median(row[key] for row in found) for key in found[0]} for name, found in rows.items()
    }


def main() -> None:
    if sys.argv[1:2] == [WORKER]:
        epoch(Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--images", type=int, default=4, help="batch of part 1")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--samples", type=int, default=512, help="images an epoch in part 4")
    parser.add_argument("--out", type=Path, default=Path("runs/bench-scale.json"))
    options = parser.parse_args()
    options.out.parent.mkdir(parents=True, exist_ok=True)
    facts: dict[str, Any] = {"hardware": hardware(), "torch": torch.__version__, "wide_resnet_34_10": {}}
    for side in (32, 64):
        found = costs(side, options.images, options.repeats, options.device)
        facts["wide_resnet_34_10"][side] = found
        print(
            f"WideResNet-34-10 at {side}x{side}, per image: attack step {found['attack_step_flop'] / 1e9:.1f} GFLOP, "
            f"{found['attack_step_seconds']:.3f} s; training pass {found['training_pass_flop'] / 1e9:.1f} GFLOP, "
            f"{found['training_pass_seconds']:.3f} s; kept {found['kept_bytes'] / 2**20:.0f} MiB",
            flush=True,
        )
    facts["steps"] = found = by_steps(options.repeats, options.device)
    print(
        f"AT, {BATCH} images: {found['start']:.3f} s + {found['per_step']:.3f} s a step, R^2 {found['r2']:.4f}",
        flush=True,
    )
    facts["methods"] = by_method(options.repeats, options.device)
    print("in units of AT: " + ", ".join(f"{name} {ratio:.2f}" for name, ratio in facts["methods"].items()), flush=True)
    facts["processes"] = found = by_processes(options.out.parent, options.samples, options.repeats)
    for name, row in found.items():
        ratio = found["1 x 1"]["epoch"] / row["epoch"]
        print(f"an epoch of AT, processes x threads {name}: {row['epoch']:.1f} s, {ratio:.2f} times as fast as 1 x 1")
    numbers, exchange = found["2 x 1"]["numbers"], found["2 x 1"]["exchange"]
    print(f"exchange of {numbers:.0f} numbers between two processes: {exchange * 1e3:.1f} ms")
    options.out.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
