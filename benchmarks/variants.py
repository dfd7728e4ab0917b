"""The ways to run one training step that ``benchmarks/gpu.py`` compares: formats, layouts, compiled or not."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

import reference
import torch
import training
from strength import strength
from torch import nn

from unmoved import Batch, Method, models, terms, train, train_step
from unmoved.data import ArraySplit
from unmoved.training.loop import WATCHED
from unmoved.training.optim import SGD

EPS = 8 / 255


@dataclass(frozen=True)
class Size:
    """What is measured: the sizes of the bars, or a miniature."""

    images: int = 50_000
    side: int = 32
    width: int = 64
    batches: tuple[int, ...] = (128, 512)
    judged: int = 1024
    lessons: int = 200
    backend: str = "inductor"


MINIATURE = Size(images=12, side=8, width=16, batches=(4,), judged=8, lessons=2, backend="eager")


@dataclass(frozen=True)
class Variant:
    """How our step runs; without ours, the reference."""

    name: str
    precision: str = "float32"
    layout: torch.memory_format = torch.channels_last
    compiled: bool = False
    ours: bool = True


REFERENCE = Variant("reference", layout=torch.contiguous_format, ours=False)
VARIANTS = (
    REFERENCE,
    Variant("float32"),
    Variant("bf16", "bf16"),
    Variant("bf16, contiguous", "bf16", layout=torch.contiguous_format),
    Variant("bf16, compiled", "bf16", compiled=True),
)


def pictures(size: Size, device: str) -> ArraySplit:
    """Random images with a pattern of their class in them, of four times eps: something to learn, and to attack."""
    draw = torch.Generator().manual_seed(0)
    y = torch.randint(10, (size.images,), generator=draw)
    shape = (3, size.side, size.side)
    patterns = torch.randint(64, (10, *shape), generator=draw, dtype=torch.uint8)
    x = patterns[y] + torch.randint(192, (size.images, *shape), generator=draw, dtype=torch.uint8)
    return ArraySplit(x, y, torch.arange(len(y)), tuple("0123456789")).to(device)


def network(size: Size, device: str) -> nn.Sequential:
    torch.manual_seed(0)
    return models.preact_resnet18((3, size.side, size.side), 10, width=size.width).to(device)


def taught(size: Size, device: str) -> dict[str, torch.Tensor]:
    """Weights after some steps on clean images: an untrained network has nothing to attack."""
    split, model = pictures(size, device), network(size, device).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    batches = forever(split, size.batches[0])
    for _ in range(size.lessons):
        train_step(model, Method(None, terms.CE("clean")), optimizer, next(batches), "float32")
    return model.state_dict()


def forever(split: ArraySplit, batch: int) -> Iterator[Batch]:
    """Whole batches of shuffled epochs, numbered as the training loop numbers them."""
    step = epoch = 0
    while True:
        for part in split.batches(batch, shuffle=epoch):
            if len(part) == batch:
                yield replace(part, step=step)
                step += 1
        epoch += 1


class Side:
    """One variant at work on a model of its own."""

    def __init__(self, variant: Variant, what: str, batch: int, size: Size, device: str) -> None:
        self.variant, self.what, self.device = variant, what, device
        model = network(size, device).to(memory_format=variant.layout).train()
        compiled: Any = torch.compile(model, backend=size.backend) if variant.compiled else model
        self.model: nn.Module = compiled
        self.optimizer = torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9)  # the same work in every step
        self.batches = forever(pictures(size, device), batch)
        self.seconds: list[float] = []
        self.peak = 0.0

    def step(self) -> None:
        batch = next(self.batches)
        if self.variant.ours:
            how = {"precision": self.variant.precision, "watch": batch.step % WATCHED == 0}
            train_step(self.model, training.method(self.what, EPS), self.optimizer, batch, **how)
        else:
            reference.STEPS[self.what](self.model, self.optimizer, batch.x, batch.y, EPS, training.INNER)

    def turn(self, steps: int) -> None:
        """Time some steps, and note the peak of memory over what is held between them."""
        done(self.device)
        held = allocated(self.device)
        began = time.perf_counter()
        for _ in range(steps):
            self.step()
        done(self.device)
        self.seconds.append((time.perf_counter() - began) / steps)
        self.peak = max(self.peak, allocated(self.device, peak=True) - held)


def whole_epoch(variant: Variant, what: str, batch: int, size: Size, device: str) -> float:
    """Seconds of the second epoch of `unmoved.train`, with all that its loop does; the first one compiles."""
    log = train(
        network(size, device),
        training.method(what, EPS),
        pictures(size, device),
        epochs=2,
        batch_size=batch,
        optimizer=SGD(lr=0.0),
        precision=variant.precision,
        compiled=variant.compiled and size.backend == "inductor",
        device=device,
    )
    return float(log[1]["seconds"] - log[0]["seconds"])


def done(device: str) -> None:
    """Wait for what the device was asked for."""
    if device == "cuda":
        torch.cuda.synchronize()


def allocated(device: str, peak: bool = False) -> float:
    """MiB on the device; with ``peak`` the most since the last call without."""
    if device != "cuda":
        return 0.0
    if peak:
        return torch.cuda.max_memory_allocated() / 2**20
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated() / 2**20


def strong(variant: Variant, what: str, weights: dict[str, torch.Tensor], size: Size, device: str) -> float:
    """Mean strength of a variant's attack on these weights."""
    model = network(size, device)
    model.load_state_dict(weights)
    model.to(memory_format=variant.layout)
    batch = next(pictures(size, device).batches(size.judged))
    return fmean(strength(model, batch, training.pgd(what, EPS), variant.precision))
