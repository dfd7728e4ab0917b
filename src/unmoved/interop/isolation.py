"""Keep what another library does to random states, gradients and modes inside its call."""

from __future__ import annotations

import random
import threading
import zlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from unmoved.core import views
from unmoved.core.batch import Batch, Image, Logits
from unmoved.core.weights import evaluating

# The global random generators belong to the whole process: libraries that draw from them run one at a time.
_ONE_AT_A_TIME = threading.RLock()


class FloatLogits(nn.Module):
    """The model with logits in float32 (float64 stays), on images of any floating type.

    Args:
        model: the model.
        dtype: what the model takes; some libraries hand on images of another type.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.model, self.dtype = model, dtype

    def forward(self, x: Image) -> Logits:
        return views.logits(self.model, x.to(self.dtype))


def key_of(seed: int, batch: Batch) -> int:
    """Return the seed of a call, below 2^32: it depends on the attack's seed, the step and the samples' identities."""
    return zlib.crc32(repr((seed, batch.step, batch.index.tolist())).encode())


@contextmanager
def isolated(model: nn.Module, seed: int) -> Iterator[None]:
    """Give the block gradients over images, random generators seeded by ``seed``, and the model in evaluation mode.

    Parameters require no gradient inside, so that no library adds to their ``.grad``. Modes, buffers, gradients and
    the generators of torch, NumPy and Python are restored after it, on exceptions too.
    """
    with ExitStack() as held:
        held.enter_context(_ONE_AT_A_TIME)
        held.enter_context(torch.inference_mode(False))
        held.enter_context(torch.enable_grad())
        held.enter_context(evaluating(model))
        held.enter_context(_constant(model))
        held.enter_context(_generators(seed))
        yield


@contextmanager
def _constant(model: nn.Module) -> Iterator[None]:
    """Let no parameter require a gradient inside the block, and restore flags and gradients after it."""
    held = [(p, p.requires_grad, p.grad) for p in model.parameters()]
    try:
        for p, _, _ in held:
            p.requires_grad, p.grad = False, None  # taken away too: ART zeroes what it finds
        yield
    finally:
        for p, required, gradient in held:
            p.requires_grad, p.grad = required, gradient


@contextmanager
def _generators(seed: int) -> Iterator[None]:
    """Seed the generators of torch, NumPy and Python, and restore their states after the block."""
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002 - the one that libraries draw from
    try:
        with torch.random.fork_rng(list(range(torch.cuda.device_count()))):
            random.seed(seed)
            np.random.seed(seed)  # noqa: NPY002
            torch.manual_seed(seed)
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002


def usable(tensor: Tensor) -> Tensor:
    """Return a copy that a library may write into, and that a backward pass may save."""
    return tensor.detach().clone()
