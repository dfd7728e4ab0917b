"""Let an attack be called as ``attack(model, x, y)``, as in other libraries, and as ``attack(model, batch)``."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TypeVar

from torch import nn

from unmoved.core.batch import Batch, Image, Label
from unmoved.core.errors import UnmovedError
from unmoved.core.protocols import takes_mixed
from unmoved.terms.mixed import require_mixable

Owner = TypeVar("Owner")


def takes_images(call: Callable[[Owner, nn.Module, Batch], Image]) -> Callable[..., Image]:
    """Wrap an attack's ``__call__(model, batch)`` so that ``attack(model, x, y)`` works, too.

    ``x`` (B, C, H, W) in [0, 1] and ``y`` (B,) become a batch whose samples have the identities 0..B-1.

    Raises:
        UnmovedError: labels given together with a batch; as `Batch`; for mixed images as `require_takes_mixed`.
    """

    @functools.wraps(call)
    def called(self: Owner, model: nn.Module, batch: Batch, y: Label | None = None) -> Image:
        if isinstance(batch, Batch) and batch.share is not None:
            require_takes_mixed(self)
        if y is None:
            return call(self, model, batch)  # which refuses what is no batch
        if isinstance(batch, Batch):
            raise UnmovedError("attack(model, batch): expected no labels beside a batch, which has its own; came some")
        return call(self, model, Batch(batch, y))

    return called


def require_takes_mixed(attack: object) -> None:
    """Raise `UnmovedError` unless an attack, and its loss if it has one, can handle images mixed from two."""
    if not takes_mixed(attack):
        raise UnmovedError(
            f"images mixed of two (CutMix): expected an attack that does nothing but climb its loss, came "
            f"{attack!r:.80}, which compares predictions with one label or remembers each image; use FGSM, NFGSM or "
            'PGD(keep="last") with one restart and no stopping rule, or leave cutmix out of the augmentation (one of '
            "your own may declare takes_mixed)"
        )
    loss = getattr(attack, "loss", None)
    if callable(loss):
        require_mixable(loss)
