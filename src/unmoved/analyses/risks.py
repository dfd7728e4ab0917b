"""Define the risks that corruptions of weights change: above all a model's loss on images."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unmoved.core import views
from unmoved.core.batch import Batch
from unmoved.core.errors import UnmovedError, did_you_mean, require_whole
from unmoved.core.precision import float32_only
from unmoved.core.preconditions import require_labels
from unmoved.core.weights import evaluating

GLOBAL = "global"


@dataclass(frozen=True)
class Point:
    """Hold a risk at one place: loss, accuracy (NaN where there is none), and the gradient, empty if not asked for."""

    loss: float
    accuracy: float
    gradient: list[Tensor] = field(default_factory=list)


class Risk(Protocol):
    """A scalar function of some tensors, which is all that a corruption needs to know.

    Attributes:
        parameters: the tensors that may be corrupted, together one vector of k entries.
        scope: their name in tables.
        images: how many images the risk is a mean over.
    """

    parameters: list[Tensor]
    scope: str
    images: int

    def held(self) -> AbstractContextManager[None]:
        """Keep all hidden state as a measurement needs it inside the block, and restore it after it."""
        ...

    def at(self, gradient: bool = False) -> Point:
        """Compute the risk at the tensors' present values; called inside ``held()``."""
        ...


class ModelRisk:
    """Measure mean cross-entropy and accuracy of a model on held images, as a function of its weights alone.

    ``L(w) = 1/N sum_i CE(f_w(x_i), y_i)`` in evaluation mode, in the weights' own format (float32 as a rule; a
    caller's autocast is left), summed in float64, so that the chunks do not show. The images are fixed: adversarial
    ones are made beforehand, at the uncorrupted weights. Buffers (the statistics of BatchNorm) are never corrupted.
    A randomised model gets the same random numbers at each point, and the caller's random state is put back.

    Args:
        model: images (B, C, H, W) in [0, 1] -> logits (B, K).
        batches: at least one image in all.
        scope: ``"global"``, all parameters that require a gradient, biases and affine weights of normalisation
            included; or the name of one of `layers`.
        batch_size: images a pass; changes nothing but speed and memory.

    Raises:
        UnmovedError: no image; no such scope or no trainable parameter; half-precision weights; from `at` labels
            without a logit, or a loss that is not finite.
    """

    def __init__(
        self, model: nn.Module, batches: Sequence[Batch], *, scope: str = GLOBAL, batch_size: int = 128
    ) -> None:
        batch_size = require_whole("batch_size", batch_size, at_least=1)
        named = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if scope != GLOBAL and scope not in named:
            raise UnmovedError(f"scope: unknown layer {scope!r}" + did_you_mean(scope, [GLOBAL, *layers(model)]))
        self.model, self.scope = model, scope
        self.parameters: list[Tensor] = [p for name, p in named.items() if scope in (GLOBAL, name)]
        if not self.parameters:
            raise UnmovedError(
                "risk: expected at least one parameter, came none; set requires_grad on those to corrupt"
            )
        for p in self.parameters:
            if p.dtype not in (torch.float32, torch.float64):
                raise UnmovedError(f"risk: expected float32 or float64 parameters, came {p.dtype}; use model.float()")
        first = self.parameters[0]
        with torch.inference_mode(False):  # tensors made in inference mode cannot be saved for a backward pass
            self.chunks = [
                (x.to(first, copy=x.is_inference()), y.to(first.device, copy=y.is_inference()))
                for batch in batches
                for x, y in zip(
                    torch.split(batch.x.detach(), batch_size), torch.split(batch.y, batch_size), strict=True
                )
                if len(y)
            ]
        self.images = sum(len(y) for _, y in self.chunks)
        if not self.images:
            raise UnmovedError("ModelRisk: expected at least one image, came none; pass held-out batches")
        self._labels = torch.stack(torch.cat([y for _, y in self.chunks]).aminmax()).cpu()

    @contextmanager
    def held(self) -> Iterator[None]:
        cuda = sorted({p.device.index for p in self.model.parameters() if p.device.type == "cuda"})
        off = float32_only(self.parameters[0].device)
        with torch.inference_mode(False), evaluating(self.model), off, torch.random.fork_rng(cuda):
            yield

    def at(self, gradient: bool = False) -> Point:
        device = self.parameters[0].device
        generators = [torch.default_generator]
        if device.type == "cuda":
            generators.append(torch.cuda.default_generators[device.index])
        for generator in generators:
            generator.manual_seed(0)
        losses, right, total = [], [], list[Tensor]()
        for x, y in self.chunks:
            with torch.set_grad_enabled(gradient):
                logits = views.logits(self.model, x)
                require_labels(self._labels, logits.shape[1])
                # No float64 on Apple's GPUs.
                wide = logits.to("cpu" if device.type == "mps" else device, torch.float64)
                loss = F.cross_entropy(wide, y.to(wide.device), reduction="sum") / self.images
            losses.append(loss.detach())
            right.append((wide.detach().argmax(dim=1) == y.to(wide.device)).sum())
            if gradient:
                # autograd.grad, so that nobody's .grad changes; zeros for what the loss does not depend on.
                part = torch.autograd.grad(loss, self.parameters, allow_unused=True, materialize_grads=True)
                total = [a.add_(b) for a, b in zip(total, part, strict=True)] if total else list(part)
        value = float(torch.stack(losses).sum())
        if not math.isfinite(value):
            raise UnmovedError(
                f"risk: expected a finite loss, came {value}; use a smaller eps, or see what the model returns"
            )
        return Point(value, int(torch.stack(right).sum()) / self.images, total)


def layers(model: nn.Module) -> list[str]:
    """Name the parameters with more than one dimension: the layers of the per-layer analysis.

    Kernels and matrices, each without its bias; vectors (biases, affine weights of normalisation) are corrupted in the
    global scope alone. The choice of tensors is that of adversarial weight perturbation (AWP).
    """
    return [name for name, p in model.named_parameters() if p.requires_grad and p.ndim > 1]
