"""Evaluate a network on images that differ from known ones in a window: incremental inference by receptive fields."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from unmoved.attacks.receptive_fields import Layer, stretches
from unmoved.core import views
from unmoved.core.batch import Image, Logits

CHECKED = 3  # queries that are computed both ways before patches are trusted
ROUNDING = 512  # units in the last place of a sample's largest logit by which the two results may differ


class Incremental:
    """Compute a network's logits for images that differ in a window from images whose feature maps are stored.

    The first layers are computed only where the window reaches. The rest is the model itself, unchanged: its calls of
    the first layers are given the stored maps with the new patches.

    Args:
        model: in evaluation mode.
        layers: its first layers, from `traced_layers.first_layers`.
        x: (B, C, H, W) the images.
        side: of the windows, in pixels.

    Attributes:
        is_on: whether patches are cheaper, and their logits have agreed with whole passes up to rounding.
        is_wrong: whether their logits disagreed.
    """

    def __init__(self, model: nn.Module, layers: Sequence[Layer], x: Image, side: int) -> None:
        self._model, self._checks = model, CHECKED
        self._stretches = stretches(layers, tuple(x.shape[1:]), side)
        self._layers = [layer for stretch in self._stretches for layer in stretch.layers]
        self.is_on, self.is_wrong = bool(self._layers), False
        self._maps: list[Tensor] = []  # (B, H, W, C) the output of each stretch for the images
        self._news: list[tuple[Tensor, Tensor]] = []  # its patches for the last queries, and their positions
        with torch.no_grad():
            for stretch in self._stretches:
                for layer in stretch.layers:
                    x = layer(x)
                self._maps.append(x.permute(0, 2, 3, 1).clone(memory_format=torch.contiguous_format))
        # A model may rely on the layout, as `Tensor.view` does.
        turned = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
        self._layout = torch.channels_last if turned else torch.contiguous_format

    def take(self, rows: Tensor) -> None:
        """Keep only these images, (n,) int64."""
        self._maps = [known.index_select(0, rows) for known in self._maps]

    def logits(self, x_new: Image, rows: Tensor, top: Tensor, left: Tensor) -> Logits:
        """Compute the logits (n, K) of images that differ from known ones in a window each.

        Args:
            x_new: (n, C, H, W).
            rows: (n,) int64, the images that they differ from.
            top, left: (n,) int64, the first row and column of the windows.
        """
        if not self._checks:
            return self._logits(x_new, rows, top, left)
        self._checks -= 1
        whole = views.logits(self._model, x_new)
        try:
            logits = self._logits(x_new, rows, top, left)
            size = torch.finfo(whole.dtype).eps * whole.abs().amax(dim=1, keepdim=True)
            self.is_on = bool(((logits - whole).abs() <= ROUNDING * size).all())
        except Exception:  # any error of the user's model: whole passes are used instead
            self.is_on = False
        self.is_wrong = not self.is_on
        return whole

    def _logits(self, x_new: Image, rows: Tensor, top: Tensor, left: Tensor) -> Logits:
        self._news = []
        whole = x_new.permute(0, 2, 3, 1).contiguous()
        with torch.no_grad():
            for stretch, known in zip(self._stretches, self._maps, strict=True):
                patches, where = stretch(whole, top, left)
                whole = known.index_select(0, rows)
                whole.flatten(0, 2).index_copy_(0, where.flatten(), patches.flatten(0, 1))
                self._news.append((patches, where))
            result = whole.permute(0, 3, 1, 2).contiguous(memory_format=self._layout)
            with _Answering(self._layers, x_new, result) as answering:
                logits = views.logits(self._model, x_new)
            return logits if answering.is_over else views.logits(self._model, x_new)

    def accept(self, rows: Tensor, which: Tensor) -> None:
        """Replace the stored images ``rows`` (m,) by images ``which`` (m,) of the last call of `logits`, both int64."""
        for known, (patches, where) in zip(self._maps, self._news, strict=True):
            moved = where.index_select(0, which) + ((rows - which) * (known.shape[1] * known.shape[2]))[:, None]
            known.flatten(0, 2).index_copy_(0, moved.flatten(), patches.index_select(0, which).flatten(0, 1))


class _Answering(TorchFunctionMode):
    """Return stored results for a model's calls of its first layers, in this thread only; compute all other calls."""

    def __init__(self, layers: Sequence[Layer], x: Image, result: Tensor) -> None:
        TorchFunctionMode.__init__(self)
        self.is_over = False
        self._x: Tensor | None = x
        self._layers, self._number, self._awaited, self._result = layers, 0, x, result
        # Nothing should read a result in between; if something does, it gets no value.
        self._nothing = x.new_full((), torch.nan)

    def __torch_function__(
        self, func: Callable[..., Any], types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if self.is_over or not args or args[0] is not self._awaited:
            return func(*args, **(kwargs or {}))
        if func != self._layers[self._number].function:
            out = func(*args, **(kwargs or {}))
            if func is Tensor.clone and args[0] is self._x:  # the copy that the model is given
                self._x, self._awaited = None, out
            return out
        shape = self._layers[self._number].shape
        self._number += 1
        self.is_over = self._number == len(self._layers)
        self._awaited = self._result if self.is_over else self._nothing.expand(len(self._result), *shape)
        return self._awaited
