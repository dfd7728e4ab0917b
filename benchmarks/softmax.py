"""Measure the share of the softmax analysis that its attacks take: ``python benchmarks/softmax.py [--n 10000]``.

A small CNN on digits' test images, repeated with a little noise to n images; APGD and FMN with 100 steps each. The bar
is a share of 80 %.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import pandas as pd
import torch

from unmoved import Batch, ThreatModel, attacks, data, models
from unmoved.analyses import softmax
from unmoved.runs.provenance import hardware


def timed(attack: Any, clock: list[float]) -> Callable[..., torch.Tensor]:
    def call(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
        began = time.perf_counter()
        out: torch.Tensor = attack(model, batch)
        clock[0] += time.perf_counter() - began
        return out

    call.minimum_norm = getattr(attack, "minimum_norm", False)  # type: ignore[attr-defined]
    return call


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--n", type=int, default=10_000)
    options = parser.parse_args()
    split = data.digits().test
    torch.manual_seed(0)
    model = models.small_cnn(split.shape, 10, padding=1, dropout=0.0, width=16).to(memory_format=torch.channels_last)
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            torch.nn.init.normal_(module.weight, std=0.1)
    (whole,) = split.batches(len(split))
    rows = torch.arange(options.n) % len(whole)
    x = (whole.x[rows] + 0.02 * torch.randn(options.n, *split.shape)).clamp(0, 1)
    with torch.no_grad():
        y = model.eval()(x).argmax(dim=1)  # every image right, so that every image is attacked
    threat, clock = ThreatModel("linf", 0.05), [0.0]
    attack, nearest = timed(attacks.APGD(threat), clock), timed(attacks.FMN(threat), clock)
    began = time.perf_counter()
    tables = []
    for start in range(0, options.n, 250):
        part = slice(start, start + 250)
        batch = Batch(x[part], y[part], torch.arange(options.n)[part])
        tables.append(softmax.collect_batch(model, batch, attack, threat, nearest))
    table = pd.concat(tables, ignore_index=True)
    softmax.within(table)
    softmax.landings(table)
    softmax.summary({"run": table})
    total = time.perf_counter() - began
    share = clock[0] / total
    print(f"n = {options.n}: {total:.1f} s, of which the attacks {clock[0]:.1f} s: {share:.1%} (bar 80 %)")
    print(hardware(), torch.__version__, f"{torch.get_num_threads()} threads")


if __name__ == "__main__":
    main()
