"""Define the risks that corruptions of weights change: any function of some tensors, or a model's loss on images."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
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
    """A risk at one place: its loss and accuracy (NaN where there is none), and the gradient where it was asked for."""

    loss: float
    accuracy: float
    gradient: list[Tensor] | None = None


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
        """All hidden state as a measurement needs it inside the block, and as it was after it."""
        ...

    def at(self, gradient: bool = False) -> Point:
        """The risk at the tensors' present values; called inside ``held()``."""
        ...


class FunctionRisk:
    """A risk given as a function without arguments that reads the tensors in ``parameters``.

    Args:
        function: returns a scalar that can be differentiated by the parameters; any other state is its own affair.
        parameters: float leaf tensors that require a gradient; corrupted in place and restored.

    Raises:
        UnmovedError: no parameter, or one that is no float leaf tensor that requires a gradient; from `at` a value
            that is no finite scalar, or does not depend on the parameters.
    """

    def __init__(self, function: Callable[[], Tensor], parameters: Sequence[Tensor]) -> None:
        self.parameters, self.scope, self.images = list(parameters), GLOBAL, 0
        self._function = function
        _require_parameters(self.parameters)

    def held(self) -> AbstractContextManager[None]:
        return nullcontext()

    def at(self, gradient: bool = False) -> Point:
        with torch.set_grad_enabled(gradient):
            value = self._function()
        if not isinstance(value, Tensor) or value.numel() != 1:
            raise UnmovedError(f"risk: expected a scalar tensor, came {_described(value)}; take the mean over samples")
        if gradient and not value.requires_grad:
            raise UnmovedError("risk: expected a function of the parameters, came a constant; compute it from them")
        _require_finite(float(value.detach()))
        return Point(float(value.detach()), math.nan, _gradient(value, self.parameters) if gradient else None)


class ModelRisk:
    """Mean cross-entropy and accuracy of a model on held images, as a function of its weights alone.

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
        _require_parameters(self.parameters)
        first = self.parameters[0]
        with torch.inference_mode(False):  # tensors made in inference mode cannot be saved for a backward pass
            self.chunks = [
                (x.to(first, copy=x.is_inference()), y.to(first.device, copy=y.is_inference()))
                for batch in batches
                for x, y in zip(batch.x.detach().split(batch_size), batch.y.split(batch_size), strict=True)
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
        losses, right, total = [], [], None
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
                part = _gradient(loss, self.parameters)
                total = part if total is None else [a.add_(b) for a, b in zip(total, part, strict=True)]
        value = float(torch.stack(losses).sum())
        _require_finite(value)
        return Point(value, int(torch.stack(right).sum()) / self.images, total)


def layers(model: nn.Module) -> list[str]:
    """The names of the parameters with more than one dimension: the layers of the per-layer analysis.

    Kernels and matrices, each without its bias; vectors (biases, affine weights of normalisation) are corrupted in the
    global scope alone. The choice of tensors is that of adversarial weight perturbation (AWP).
    """
    return [name for name, p in model.named_parameters() if p.requires_grad and p.ndim > 1]


def _gradient(value: Tensor, parameters: list[Tensor]) -> list[Tensor]:
    """By ``autograd.grad``, so that nobody's ``.grad`` changes; zeros for what the value does not depend on."""
    return list(torch.autograd.grad(value, parameters, allow_unused=True, materialize_grads=True))


def _described(value: object) -> str:
    return f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"


def _require_finite(loss: float) -> None:
    if not math.isfinite(loss):
        raise UnmovedError(
            f"risk: expected a finite loss, came {loss}; use a smaller eps, or see what the model returns"
        )


def _require_parameters(parameters: Sequence[Tensor]) -> None:
    if not parameters:
        raise UnmovedError("risk: expected at least one parameter, came none; set requires_grad on those to corrupt")
    for p in parameters:
        if p.dtype not in (torch.float32, torch.float64) or not (p.is_leaf and p.requires_grad):
            raise UnmovedError(
                f"risk: expected float32 or float64 leaf tensors that require a gradient, came {p.dtype} with "
                f"is_leaf={p.is_leaf}, requires_grad={p.requires_grad}; use model.float() and requires_grad_()"
            )
