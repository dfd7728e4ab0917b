"""Take one training step: attack the batch once, then let the defense take the gradient and the step."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from unmoved.attacks.call_signature import require_takes_mixed
from unmoved.core import collectives, weights
from unmoved.core import precision as formats
from unmoved.core.batch import Batch
from unmoved.core.errors import UnmovedError
from unmoved.core.preconditions import require_images, without_waiting
from unmoved.core.protocols import Method, StatefulAttack
from unmoved.core.threat import bounds_of
from unmoved.core.views import Views
from unmoved.defenses import Plain
from unmoved.terms.mixed import require_mixable
from unmoved.terms.sum import as_sum, stateful


class Diverged(UnmovedError):
    """Report that the loss or a weight became NaN or infinite."""


@dataclass(frozen=True)
class Step:
    """Hold loss and accuracy of one optimizer step, at the uncorrupted weights.

    Attributes:
        loss: the mean objective.
        parts: each term's own mean, unweighted.
        accuracy: share of the batch that was right on the view trained on; for an image mixed from two, the label of
            the larger part counts as right.
    """

    loss: Tensor
    parts: dict[str, Tensor]
    accuracy: Tensor


def train_step(
    model: nn.Module,
    method: Method,
    optimizer: Optimizer,
    batch: Batch,
    precision: str = "auto",
    *,
    attacked: nn.Module | None = None,
    backward: Callable[[Tensor], object] = Tensor.backward,
    watch: bool = True,
    bounds: tuple[float, float] | None = None,
) -> Step:
    """Take one step of a method: make x_adv once, then let the defense take gradient and step.

    Args:
        model: in training mode, its parameters (and those of learned terms) in ``optimizer``. Other
            parameters are constant in the step: no defense moves them, and their ``.grad`` stays as it was.
        method: what to do.
        batch: images, labels, identities; set ``batch.step`` so that each step draws new noise.
        precision: ``"auto"``, ``"float32"`` or ``"bf16"``; parameters stay float32.
        attacked: the bare module, if ``model`` is a wrapper.
        backward: computes gradients from a loss, if the engine has its own function for it.
        watch: whether to check images, labels and the loss, which waits for a GPU.
        bounds: smallest and largest valid pixel value if the attack has no threat model; [0, 1] by default.

    Raises:
        UnmovedError: with ``watch``, images out of bounds, labels beyond the logits, a loss that is
            not finite (`Diverged`); a term that does not return (B,), a loss without a gradient; an attack
            or term that needs one label per image, with mixed images. Raised before anything is changed.
    """
    with nullcontext() if watch else without_waiting():
        if not isinstance(model, nn.Module) or not isinstance(method, Method) or not isinstance(batch, Batch):
            came = ", ".join(type(value).__name__ for value in (model, method, batch))
            raise UnmovedError(
                f"train_step: expected a model (an nn.Module), a Method and a Batch, came {came}; the order is "
                "train_step(model, Method(attack, objective), optimizer, Batch(images, labels))"
            )
        if batch.share is not None:
            require_mixable(method.objective)
            if method.attack is not None:
                require_takes_mixed(method.attack)
        require_images(batch.x, bounds_of(method.attack) or bounds or (0.0, 1.0))
        modules = (model if attacked is None else attacked, *stateful(as_sum(method.objective)))
        with weights.constant_beside(optimizer, *modules):
            return _step(model, method, optimizer, batch, precision, attacked, backward, watch)


def _step(
    model: nn.Module,
    method: Method,
    optimizer: Optimizer,
    batch: Batch,
    precision: str,
    attacked: nn.Module | None,
    backward: Callable[[Tensor], object],
    watch: bool,
) -> Step:
    objective, bare = as_sum(method.objective), model if attacked is None else attacked
    x_adv = None
    if method.attack is not None:
        with formats.autocast(precision, batch.x.device), formats.constant_weights(bare):
            x_adv = method.attack(bare, batch)
        if not isinstance(x_adv, Tensor) or x_adv.shape != batch.x.shape:
            came = f"shape {tuple(x_adv.shape)}" if isinstance(x_adv, Tensor) else type(x_adv).__name__
            raise UnmovedError(f"attack {method.attack!r:.80}: expected images {tuple(batch.x.shape)}, came {came}")
    first: list[tuple[Views, Step]] = []

    def closure() -> Tensor:
        with formats.autocast(precision, batch.x.device):
            views = Views(model, batch, x_adv)
            parts = objective.parts(views)
            values = objective.combine(parts)
            loss = collectives.mean(values)
        if not loss.requires_grad:
            raise UnmovedError(_why_constant(bare, optimizer))
        means = {name: part.detach().mean() for name, part in parts.items()}
        if watch and not torch.isfinite(loss):
            words = ", ".join(f"{name} = {value:g}" for name, value in means.items())
            raise Diverged(f"the loss became {loss.item():g} at step {batch.step} ({words})")
        if not first:
            # A view that the objective did not use is not computed here: its pass would move BatchNorm's statistics.
            logits = views.adv if views.has("adv") else views.clean
            accuracy = (logits.detach().argmax(dim=1) == batch.largest).double().mean()
            first.append((views, Step(values.detach().mean(), means, accuracy)))
        backward(loss)
        return loss.detach()

    with formats.no_tf32(precision, batch.x.device):
        (method.defense or Plain())(model, optimizer, closure)
    if not first:
        raise UnmovedError(
            f"defense {method.defense!r:.80}: expected it to call backward() once at least, came no call"
        )
    views, step = first[0]
    with torch.no_grad():
        for term in stateful(objective):
            term.update(views)
        if isinstance(method.attack, StatefulAttack) and x_adv is not None:
            method.attack.update(bare, batch, x_adv)
    return step


def _why_constant(model: nn.Module, optimizer: Optimizer) -> str:
    """Say why the loss has no gradient over anything that the optimizer steps, and what to do."""
    expected = "train_step: expected a loss that depends on the parameters that the optimizer steps, but it "
    if weights.trainable(model, optimizer):
        return (
            f"{expected}has no gradient; look for .detach(), .data, .numpy() or torch.no_grad() in the model's forward "
            "and in the terms"
        )
    return (
        f"{expected}steps none of the model's that require a gradient: they are frozen, or the optimizer holds copies "
        "or those of another model; make it of model.parameters()"
    )
