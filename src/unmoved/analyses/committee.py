"""Compute the probabilities of several models, and join them into one model that can be attacked.

Three ways to make the images of an adversarial bias and variance: against each model itself (attack each with its own);
shared (make one perturbation, against any model, and show it to all); joint (attack `joint(models)`, a reconstruction
[R], and show that to all).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from unmoved.core.batch import Image, Logits
from unmoved.core.errors import UnmovedError, require_whole
from unmoved.core.views import eval_logits, logits


class Joint(nn.Module):
    """Compute ``log ((1/k) sum_k softmax(z_k))``: logits whose softmax is the mean probability of k models."""

    def __init__(self, models: Sequence[nn.Module]) -> None:
        super().__init__()
        self.models = nn.ModuleList(models)

    def forward(self, x: Image) -> Logits:
        every = torch.stack([torch.log_softmax(logits(model, x), dim=1) for model in self.models])
        return torch.logsumexp(every, dim=0) - math.log(len(every))


def joint(models: Sequence[nn.Module]) -> Joint:
    """Make one model whose logits are the log of the mean probability of ``models``, for any attack; nothing is copied.

    Raises:
        UnmovedError: no model.
    """
    if len(models) == 0:
        raise UnmovedError("joint: expected at least one model, came none")
    return Joint(models)


def probabilities(models: Sequence[nn.Module], x_by_model: Sequence[Image], batch_size: int = 256) -> Tensor:
    """Compute ``p[k] = softmax(models[k](x_by_model[k]))`` in eval mode, float64, on the CPU; models stay as they were.

    Args:
        models: k models; to go on where one stopped, call this with one at a time and concatenate.
        x_by_model: k times (N, C, H, W), the images attacked against each model; ``[x] * k`` shows the same to all.
        batch_size: images at a time.

    Returns:
        (k, N, K).

    Raises:
        UnmovedError: no model or image, not one set of images a model, sets of different length, or models of different
            numbers of classes.
    """
    batch_size = require_whole("probabilities: batch_size", batch_size, at_least=1)
    lengths = None if isinstance(x_by_model, Tensor) else [len(x) for x in x_by_model]
    if lengths is None or len(lengths) != len(models) or len(set(lengths)) != 1 or lengths[0] == 0:
        came = "one tensor" if lengths is None else f"sets of {lengths} images for {len(models)} models"
        raise UnmovedError(
            f"probabilities: expected a list, one set of images a model, all of one length >= 1, came {came}; "
            "[x] * len(models) shows the same images to all"
        )
    parts = [_of_one(model, x, batch_size) for model, x in zip(models, x_by_model, strict=True)]
    if len({part.shape[1] for part in parts}) > 1:
        raise UnmovedError(
            f"probabilities: expected models of the same classes, came {[part.shape[1] for part in parts]}"
        )
    return torch.stack(parts)


def _of_one(model: nn.Module, x: Image, batch_size: int) -> Tensor:
    place = next((tensor.device for tensor in (*model.parameters(), *model.buffers())), x.device)
    with torch.random.fork_rng(list(range(torch.cuda.device_count()))):
        torch.manual_seed(0)  # of a randomised model: what it draws neither depends on the caller nor moves his state
        return torch.cat(
            [
                torch.softmax(eval_logits(model, some.to(place)).double(), dim=1).cpu()
                for some in torch.split(x, batch_size)
            ]
        )
