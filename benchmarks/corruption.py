"""Time one corruption sweep: ``python benchmarks/corruption.py``.

A SmallCNN of full width on 28x28 images, float32: random and adversarial corruptions over a grid of relative eps.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from pathlib import Path

import numpy as np
import torch

from unmoved import Batch, models
from unmoved.analyses import corruption, flatness
from unmoved.analyses.risks import ModelRisk
from unmoved.runs.provenance import hardware


def build(images: int, seed: int) -> tuple[torch.nn.Module, Batch]:
    """An untrained model (the time does not depend on its weights) and images it labels itself, one in ten wrongly."""
    torch.manual_seed(seed)
    model = models.small_cnn((1, 28, 28), 10).to(memory_format=torch.channels_last).eval()
    for p in model.parameters():  # the last layer starts at zero, where nothing before it has a gradient
        if p.ndim == 2:
            torch.nn.init.normal_(p, std=1 / math.sqrt(p.shape[1]))
    x = torch.rand(images, 1, 28, 28, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        y = model(x).argmax(dim=1)
    y[::10] = (y[::10] + 1) % 10
    return model, Batch(x, y)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--grid", type=int, default=10, help="how many eps")
    parser.add_argument("--draws", type=int, default=20)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--bar", type=float, default=120.0, help="seconds, on 2 cores")
    parser.add_argument("--out", type=Path, default=Path("runs/bench-corruption.json"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model, batch = build(options.images, seed=0)
    risk = ModelRisk(model.to(options.device), [batch], batch_size=options.batch_size)
    grid = np.geomspace(1e-3, 1e-1, options.grid).tolist()
    corruption.sweep(risk, grid[:1], draws=1, steps=1)  # the first passes are slower
    begin, processor = time.perf_counter(), time.process_time()
    table = corruption.sweep(risk, grid, draws=options.draws, steps=options.steps)
    seconds, processor = time.perf_counter() - begin, time.process_time() - processor
    forward = 1 + options.grid * (options.draws + options.steps)
    backward = 1 + options.grid * max(options.steps - 1, 0)
    rate = options.images * forward / seconds
    verdict = "" if seconds <= options.bar else "  MISSED"
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else math.nan
    print(f"{seconds:.1f} s (bar {options.bar:g} s){verdict}; {rate:.0f} images/s forward")
    print(f"{processor:.1f} s of processor time, load {load:.1f}: on a busy machine the first number says little")
    print(f"{forward} passes over {options.images} images, {backward} of them with a gradient")
    facts = {"hardware": hardware(), "torch": torch.__version__, "device": str(risk.parameters[0].device)}
    print(json.dumps(facts, indent=2))
    settings = {name: getattr(options, name) for name in ("images", "grid", "draws", "steps", "batch_size")}
    summary = flatness.summarise(table).to_dict("list")
    times = {"seconds": seconds, "processor_seconds": processor, "load": load, "images_per_second": rate}
    result = {**facts, **settings, **times, "summary": summary}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
