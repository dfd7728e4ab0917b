"""Compute a term's gradient with respect to the images, and leave the model as it was, for all gradient attacks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from unmoved.core import views as seen
from unmoved.core.batch import Batch, Image, Label, Logits, PerSample, per_image
from unmoved.core.errors import UnmovedError
from unmoved.core.malloc import keep_freed_memory
from unmoved.core.model_errors import cause_in_graph
from unmoved.core.precision import float32_only
from unmoved.core.preconditions import require_images, values_of
from unmoved.core.protocols import Term
from unmoved.core.threat import ThreatModel
from unmoved.core.views import Views
from unmoved.core.weights import evaluating
from unmoved.terms.margin import best_wrong, margin

MODES = ("eval", "train")


@contextmanager
def attacking(model: nn.Module, batch: Batch, threat: ThreatModel, mode: str = "eval") -> Iterator[Views]:
    """Yield the views of a batch with gradients on (also inside no_grad and inference_mode), the model in ``mode``.

    Raises:
        UnmovedError: as `require_attackable`; with the first logits, labels that they have no column for.
    """
    require_attackable(model, batch, threat)
    keep_freed_memory()
    with torch.inference_mode(False), torch.enable_grad(), evaluating(model, mode):
        yield Views(model, batch.map(_usable))


def require_attackable(model: object, batch: object, threat: ThreatModel) -> None:
    """Raise `UnmovedError` unless these are a model and a batch whose images lie within the threat model's bounds."""
    if not isinstance(model, nn.Module) or not isinstance(batch, Batch):
        came = f"({type(model).__name__}, {type(batch).__name__})"
        raise UnmovedError(f"attack: expected a model, an nn.Module, and a Batch(images, labels), came {came}")
    require_images(batch.x, threat.bounds)


def _usable(tensor: Tensor) -> Tensor:
    """Detach; copy what was made in inference mode, since that cannot be saved for a backward pass."""
    return tensor.clone() if tensor.is_inference() else tensor.detach()


def gradient_at(base: Views, x_adv: Image, loss: Term, draws: int = 1) -> tuple[PerSample, Tensor, Logits]:
    """Compute the loss (B,), its gradient over the input (B, C, H, W) and the logits (B, K) at ``x_adv``.

    All three are means over ``draws`` passes of a randomised model (expectation over transformation, Athalye et al.
    2018). The loss is summed over the batch: a mean would push small gradients below what half precision holds.
    Parameter gradients are neither computed nor touched.

    Raises:
        UnmovedError: the loss does not depend on the adversarial image, or is not one number a sample.
    """
    if draws > 1:
        several = [gradient_at(base, x_adv, loss) for _ in range(draws)]
        loss_, slope, logits = (torch.stack(part).mean(0) for part in zip(*several, strict=True))
        return loss_, slope, logits
    x = x_adv.detach().requires_grad_(True)
    views = base.at(x)
    value = values_of(loss, views, "attack loss")
    gradient = input_gradient(value, x)
    if gradient is None:
        raise UnmovedError(
            f"attack loss {loss!r}: expected a differentiable term of the adversarial view, but its gradient over the "
            f'image does not exist; use a term of "adv", such as CE("adv"), and {_DIFFERENTIABLE}'
        )
    return value.detach(), gradient, views.adv.detach()


def input_gradient(values: Tensor, x: Image, *, retain: bool = False) -> Tensor | None:
    """Compute the gradient of the sum of ``values`` over ``x``; None where there is none.

    Args:
        retain: whether the graph is needed again.

    Raises:
        UnmovedError: the model's checkpoints are of a kind that has no such gradient.
    """
    if not values.requires_grad:
        return None
    try:
        return torch.autograd.grad(values.sum(), x, retain_graph=retain, allow_unused=True)[0]
    except NotImplementedError:  # a function of the model's own without a backward pass
        return None
    except RuntimeError as error:
        known = cause_in_graph(error)
        if known is None:
            raise
        raise UnmovedError(f"model: {known}") from error


def not_differentiable(model: nn.Module) -> UnmovedError:
    """Return the error of an attack that needs the gradient of the logits themselves."""
    return UnmovedError(
        f"model {type(model).__name__}: expected logits that are differentiable in the image, but their gradient does "
        f"not exist; use {_DIFFERENTIABLE}"
    )


_DIFFERENTIABLE = (
    "a model that neither detaches nor binarises its input, or an attack without gradients, such as SPSA or Square"
)


def value_at(base: Views, x_adv: Image, loss: Term, logits: Logits | None = None) -> tuple[PerSample, Logits]:
    """Compute the loss (B,) and, unless they are given, the logits (B, K) at ``x_adv``, without a gradient."""
    with torch.no_grad():
        views = base.at(x_adv, logits)
        return values_of(loss, views, "attack loss"), views.adv


def crossed(logits: Logits, y: Label) -> Tensor:
    """Return which samples are misclassified by more than the rounding of another batch size, (B,) bool."""
    return margin(logits, y) > rounding(logits, y)


def rounding(logits: Logits, y: Label) -> PerSample:
    """Bound the change of a margin when its sums are computed in another order, (B,): a share of its two logits' size.

    The other logits do not count: a masked class has a logit of -1e9 or of minus infinity.
    """
    size = torch.maximum(best_wrong(logits, y).abs(), logits.gather(1, y[:, None]).squeeze(1).abs())
    return 32 * torch.finfo(logits.dtype).eps * torch.where(size.isfinite(), size, 0.0)


def broken(model: nn.Module, x_adv: Image, logits: Logits | None, y: Label) -> Tensor:
    """Return which proposals are misclassified, (B,) bool, as `crossed`; under autocast float32 confirms a success.

    Without logits, they are computed for every proposal.
    """
    wrong = torch.ones_like(y, dtype=torch.bool) if logits is None else crossed(logits, y)
    if torch.is_autocast_enabled(x_adv.device.type) and wrong.any():
        with torch.no_grad(), float32_only(x_adv.device):
            wrong[wrong.clone()] = crossed(seen.logits(model, x_adv[wrong]), y[wrong])
    return wrong


class Best:
    """Keep the best proposal so far for each sample: misclassified ones first, then the highest loss.

    Its order makes success final: more steps or more restarts never turn a broken sample into a robust one.
    """

    def __init__(self) -> None:
        self.x: Image | None = None

    def offer(self, x_adv: Image, value: PerSample, wrong: Tensor, where: Tensor | None = None) -> None:
        """Keep the proposals that are better than those before.

        Args:
            x_adv, value, wrong: (n, ...) proposals, their losses, and which of them are misclassified.
            where: (n,) the samples that they belong to; all, in order, if None.
        """
        if self.x is None:
            self.x, self.value, self.wrong = x_adv.detach().clone(), value.clone(), wrong.clone()
            return
        where = torch.arange(len(self.x), device=self.x.device) if where is None else where
        held, loss, was_wrong = self.x[where], self.value[where], self.wrong[where]
        better = (wrong & ~was_wrong) | ((wrong == was_wrong) & (value > loss))
        self.x[where] = torch.where(per_image(better, x_adv), x_adv.detach(), held)
        self.value[where] = torch.where(better, value, loss)
        self.wrong[where] = was_wrong | wrong
