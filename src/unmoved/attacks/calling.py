"""Let an attack be called with images and labels, as other libraries call theirs, beside a batch."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TypeVar

from torch import nn

from unmoved.core.batch import Batch, Image, Label
from unmoved.core.errors import UnmovedError

Owner = TypeVar("Owner")


def takes_images(call: Callable[[Owner, nn.Module, Batch], Image]) -> Callable[..., Image]:
    """Wrap an attack's ``__call__(model, batch)`` so that ``attack(model, x, y)`` works, too.

    ``x`` (B, C, H, W) in [0, 1] and ``y`` (B,) become a batch whose samples have the identities 0..B-1.

    Raises:
        UnmovedError: labels beside a batch, which has its own; as `Batch`.
    """

    @functools.wraps(call)
    def called(self: Owner, model: nn.Module, batch: Batch, y: Label | None = None) -> Image:
        if y is None:
            return call(self, model, batch)  # which refuses what is no batch
        if isinstance(batch, Batch):
            raise UnmovedError("attack(model, batch): expected no labels beside a batch, which has its own; came some")
        return call(self, model, Batch(batch, y))

    return called
