"""Which weight corruptions are allowed, and the guards that restore what a corruption or an attack changes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


def trainable(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that a corruption may touch: those that require a gradient."""
    return [p for p in model.parameters() if p.requires_grad]


def norm(tensors: Iterable[Tensor]) -> Tensor:
    """The l2 norm of several tensors taken together as one vector."""
    return torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(t) for t in tensors]))


@contextmanager
def perturbed(parameters: Sequence[Tensor], corruption: Sequence[Tensor]) -> Iterator[None]:
    """The parameters moved by ``corruption`` inside the block, restored bit for bit after it, on exceptions too."""
    saved = [p.detach().clone() for p in parameters]
    try:
        with torch.no_grad():
            for p, v in zip(parameters, corruption, strict=True):
                p.add_(v)
            torch.clear_autocast_cache()  # a caller's own autocast would go on with the weights it cast before
        yield
    finally:
        with torch.no_grad():
            for p, old in zip(parameters, saved, strict=True):
                p.copy_(old)
            torch.clear_autocast_cache()


@contextmanager
def evaluating(model: nn.Module, mode: str = "eval") -> Iterator[None]:
    """The model in the mode an attack wants, every submodule's own mode restored after it.

    Args:
        mode: ``"eval"``; or ``"train"``: batch statistics and dropout in the submodules that are training already,
            with the running statistics frozen and the random state restored.
    """
    if mode == "train":
        with frozen_batchnorm(model), torch.random.fork_rng(_cuda_devices(model)):
            yield
        return
    modes = [(module, module.training) for module in model.modules()]
    try:
        for module, _ in modes:
            module.training = False
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def frozen_batchnorm(model: nn.Module) -> Iterator[None]:
    """Normalisation by batch statistics without moving the running ones (nor ``num_batches_tracked``)."""
    tracking = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.training and m.track_running_stats]
    try:
        for module in tracking:
            module.track_running_stats = False
        yield
    finally:
        for module in tracking:
            module.track_running_stats = True


def _cuda_devices(model: nn.Module) -> list[int]:
    return sorted({p.device.index for p in model.parameters() if p.device.type == "cuda"})
