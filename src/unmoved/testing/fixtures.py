"""Make small models and batches for the checks, and watch that a part under test changes nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from unmoved.core.batch import Batch


class ExamFailed(AssertionError):
    """Report a property that the contract asks for and that does not hold."""


def require(holds: bool | Tensor, property_: str) -> None:
    """Raise `ExamFailed` with the property unless it holds."""
    if not bool(holds):
        raise ExamFailed(property_)


def network() -> nn.Sequential:
    """Make a small network with two BatchNorms and a dropout of 0, in training mode, the same at each call."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        first = [nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU()]
        return nn.Sequential(
            *first, nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Dropout(0.0), nn.Linear(64, 5)
        )


def small_batch() -> Batch:
    """Make eight random images of 5 classes, with identities and a step of their own."""
    draw = torch.Generator().manual_seed(2)
    x = torch.rand(8, 1, 8, 8, generator=draw)
    return Batch(x, torch.randint(5, (8,), generator=draw), index=torch.arange(100, 108), step=7)


class Planned(Exception):
    """Report nothing: it is raised on purpose."""


class Failing(nn.Module):
    """A model whose n-th forward pass raises."""

    def __init__(self, inner: nn.Module, fails_at: int) -> None:
        super().__init__()
        self.inner, self.left = inner, fails_at

    def forward(self, x: Tensor) -> Tensor:
        self.left -= 1
        if self.left == 0:
            raise Planned
        logits: Tensor = self.inner(x)
        return logits


@contextmanager
def untouched(subject: object) -> Iterator[None]:
    """Check that parameters, buffers, gradients, requires_grad and modes of a module are the same after the block."""
    if not isinstance(subject, nn.Module):
        yield
        return
    before = _state(subject)
    yield
    after = _state(subject)
    for key, old in before.items():
        new = after[key]
        same = torch.equal(old, new) if isinstance(old, Tensor) and isinstance(new, Tensor) else old is new
        require(same, f"{type(subject).__name__}: {key} changed")


def _state(module: nn.Module) -> dict[str, Tensor | bool | None]:
    facts: dict[str, Tensor | bool | None] = {f"state {key}": v.clone() for key, v in module.state_dict().items()}
    for name, p in module.named_parameters():
        facts[f"gradient of {name}"] = None if p.grad is None else p.grad.clone()
        facts[f"requires_grad of {name}"] = p.requires_grad
    for name, sub in module.named_modules():
        facts[f"mode of {name or 'the model'}"] = sub.training
        if isinstance(sub, nn.BatchNorm2d):
            facts[f"tracking of {name}"] = sub.track_running_stats
    return facts


@contextmanager
def same_random_state() -> Iterator[None]:
    """Check that the global random state is the same after the block."""
    before = torch.random.get_rng_state()
    yield
    require(torch.equal(before, torch.random.get_rng_state()), "the global random state changed")
