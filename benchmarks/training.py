"""Time training steps against a plain reference, as ratios measured in turn within one run.

    python benchmarks/training.py [--model small_cnn] [--method TRADES] [--pairs 5] [--device cpu] [--precision auto]

Each row times one step of ours and one of ``benchmarks/reference.py`` alternately from the same weights on the same
batch of 128, 10 inner steps; the ratio is the median over pairs. ``share`` is what our step reaches of the machine's
matrix-product rate (2048^3, the step's format); ``strength`` compares the inner losses that the two attacks end at,
as the mean over starts of both (one start alone scatters by a hundredth or two).
Peak memory is that of a process of its own for each side.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import reference
import torch
from strength import strength
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from unmoved import Batch, Method, ThreatModel, attacks, defenses, models, terms, train_step
from unmoved.core import precision as formats
from unmoved.runs.provenance import hardware

BATCH, INNER, LESSONS = 128, 10, 60
# name -> (factory, shape, eps)
NETWORKS: dict[str, tuple[Any, tuple[int, int, int], float]] = {
    "small_cnn": (models.small_cnn, (1, 28, 28), 0.3),
    "preact_resnet18": (models.preact_resnet18, (3, 32, 32), 8 / 255),
}


def method(name: str, eps: float) -> Method:
    threat = ThreatModel("linf", eps)
    kl = attacks.PGD(threat, loss=terms.KL(), start="gaussian", steps=INNER)
    ce = attacks.PGD(threat, steps=INNER)
    sensible = attacks.PGD(threat, steps=INNER, stop=attacks.Sensible(0.5))
    return {
        "AT": Method(ce, terms.CE()),
        "TRADES": Method(kl, terms.TRADES(6.0)),
        "MART": Method(attacks.PGD(threat, start="gaussian", steps=INNER), terms.MART(6.0)),
        "TRADES-AWP": Method(kl, terms.TRADES(6.0), defenses.AWP(0.005)),
        "SENSE": Method(sensible, terms.CE()),
        "APD": Method(ce, terms.CE(), defenses.APD(0.01, steps=2, relative=True)),
    }[name]


def pgd(name: str, eps: float) -> attacks.PGD:
    """The attack of a method."""
    attack = method(name, eps).attack
    assert isinstance(attack, attacks.PGD)
    return attack


def network(name: str, device: str, layout: torch.memory_format = torch.contiguous_format) -> nn.Module:
    torch.manual_seed(0)
    factory, shape, _ = NETWORKS[name]
    settings = {"dropout": 0.0} if name == "small_cnn" else {"width": 16}
    model: nn.Module = factory(shape, 10, **settings)
    for module in model.modules():  # a last layer of zeros leaves nothing to attack
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.1)
    return model.to(device).to(memory_format=layout)


def data(name: str, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Random images, labelled by the model, so that stopping rules have right samples to work on."""
    x = torch.rand(BATCH, *NETWORKS[name][1], generator=torch.Generator().manual_seed(0)).to(device)
    with torch.no_grad():
        return x, network(name, device).eval()(x).argmax(dim=1)


class Side:
    """Our step or the reference's, on a model of its own."""

    def __init__(self, who: str, name: str, what: str, device: str, precision: str) -> None:
        self.who, self.name, self.what, self.device, self.precision = who, name, what, device, precision
        layout = torch.channels_last if who == "ours" else torch.contiguous_format
        self.model = network(name, device, layout).train()
        self.state = {key: value.clone() for key, value in self.model.state_dict().items()}
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.0, momentum=0.9)
        self.x, self.y = data(name, device)
        self.eps = NETWORKS[name][2]

    def step(self) -> None:
        if self.who == "ours":
            batch = Batch(self.x, self.y)
            train_step(self.model, method(self.what, self.eps), self.optimizer, batch, precision=self.precision)
        else:
            reference.STEPS[self.what](self.model, self.optimizer, self.x, self.y, self.eps, INNER)

    def seconds(self) -> float:
        self.model.load_state_dict(self.state)
        if self.device == "cuda":
            torch.cuda.synchronize()
        began = time.perf_counter()
        self.step()
        if self.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - began


class Flops(TorchDispatchMode):
    """Counts what products and convolutions cost, forward and backward."""

    total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        cost = flop_registry.get(func._overloadpacket)
        self.total += 0 if cost is None else cost(*args, **(kwargs or {}), out_val=out)
        return out


def memory(who: str, name: str, what: str, device: str, precision: str) -> float:
    """Peak memory of one step in MiB: of this process on a CPU (less what the import took), of the device otherwise."""
    side = Side(who, name, what, device, precision)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        side.step()
        return torch.cuda.max_memory_allocated() / 2**20
    before = peak_mib()
    side.step()
    return peak_mib() - before


def peak_mib() -> float:
    """The most that this process has held, where /proc tells; rusage would begin with the peak of its parent."""
    status = Path("/proc/self/status")
    return (
        int(status.read_text(encoding="utf-8").partition("VmHWM:")[2].split()[0]) / 2**10
        if status.exists()
        else float("nan")
    )


def taught(name: str, device: str) -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    """A network after some clean steps, and what it learned: an untrained one has nothing to attack. (model, x, y)."""
    model, (_, shape, eps) = network(name, device).train(), NETWORKS[name]
    draw = torch.Generator().manual_seed(1)
    y = torch.randint(10, (4 * BATCH,), generator=draw)
    marks, share = torch.rand(10, *shape, generator=draw), min(4 * eps, 0.6)  # each image has the mark of its class
    x = ((1 - share) * torch.rand(len(y), *shape, generator=draw) + share * marks[y]).to(device)
    y = y.to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    for step in range(LESSONS):
        part = slice(step % 4 * BATCH, (step % 4 + 1) * BATCH)
        train_step(model, Method(None, terms.CE("clean")), optimizer, Batch(x[part], y[part]), "float32")
    return model.eval(), x, y


def matrix_rate(device: str, kind: torch.dtype) -> float:
    """FLOP/s of a product of two 2048 x 2048 matrices, the best of five."""
    a = torch.randn(2048, 2048, device=device, dtype=kind)
    best = float("inf")
    for _ in range(6):
        if device == "cuda":
            torch.cuda.synchronize()
        began = time.perf_counter()
        a @ a
        if device == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - began)
    return 2 * 2048**3 / best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="append", choices=sorted(NETWORKS))
    parser.add_argument("--method", action="append", choices=sorted(reference.STEPS))
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--no-memory", action="store_true", help="leave out the processes that measure memory")
    parser.add_argument("--out", type=Path, default=Path("runs/bench-training.json"))
    options = parser.parse_args()
    low = formats.resolve(options.precision, torch.device(options.device)) == "bf16"
    rate = matrix_rate(options.device, torch.bfloat16 if low else torch.float32)
    form = "bf16" if low else "float32"
    print(f"matrix product: {rate / 1e9:.0f} GFLOP/s in {form}, {torch.get_num_threads()} threads")
    print(f"{'model':18}{'step':12}{'ours':>9}{'theirs':>9}{'ratio':>7}{'share':>7}{'MiB':>7}{'theirs':>8}")
    rows, strengths = [], {}
    for name in options.model or NETWORKS:
        model, x, y = taught(name, options.device)
        strong = strengths[name] = strength(model, Batch(x, y), pgd("TRADES", NETWORKS[name][2]), options.precision)
        print(
            f"{name}: strength of TRADES' attack {statistics.mean(strong):.3f}"
            f" ({min(strong):.3f} to {max(strong):.3f} over {len(strong)} starts)"
        )
        for what in options.method or reference.STEPS:
            sides = [Side(who, name, what, options.device, options.precision) for who in ("ours", "reference")]
            with Flops() as counter:
                sides[0].step()
            sides[1].step()
            pairs = [(sides[0].seconds(), sides[1].seconds()) for _ in range(options.pairs)]
            ours, theirs = (statistics.median(column) for column in zip(*pairs, strict=True))
            ratio = statistics.median(b / a for a, b in pairs)
            share = counter.total / ours / rate
            peaks = [float("nan")] * 2
            if not options.no_memory:
                for k, who in enumerate(("ours", "reference")):  # a process each: a peak cannot be forgotten
                    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
                        asked = (who, name, what, options.device, options.precision)
                        peaks[k] = pool.submit(memory, *asked).result()
            rows.append({"model": name, "step": what, "images_per_second": BATCH / ours, "reference": BATCH / theirs})
            rows[-1] |= {"ratio": ratio, "share": share, "peak_mib": peaks[0], "reference_peak_mib": peaks[1]}
            print(
                f"{name:18}{what:12}{BATCH / ours:9.0f}{BATCH / theirs:9.0f}{ratio:7.2f}{share:7.1%}"
                f"{peaks[0]:7.0f}{peaks[1]:8.0f}",
                flush=True,
            )
    options.out.parent.mkdir(parents=True, exist_ok=True)
    facts = {"hardware": hardware(), "torch": torch.__version__, "precision": options.precision, "pairs": options.pairs}
    options.out.write_text(json.dumps(facts | {"strength": strengths, "rows": rows}, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
