"""Hold a model's logits of clean and of adversarial images, each computed at most once and only when asked for."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Self

import torch
from torch import Tensor, nn

from unmoved.core.batch import Batch, Image, Index, Label, Logits, PerSample
from unmoved.core.errors import UnmovedError, require_choice
from unmoved.core.model_errors import explained
from unmoved.core.precision import float32_only
from unmoved.core.preconditions import require_labels
from unmoved.core.weights import evaluating, frozen_buffers


def logits(model: nn.Module, x: Image) -> Logits:
    """Compute the model's logits in float32 (float64 stays), so that losses never lose digits under autocast.

    Raises:
        UnmovedError: the model returns something other than a (B, K) tensor; as `model_errors.explained`.
    """
    # A forward may write into its input. What torch.compile returned warns of a copy that has a history.
    own = x if x.requires_grad and hasattr(model, "_orig_mod") else x.clone()
    try:
        out: object = model(own)
    except (AssertionError, RuntimeError, TypeError, ValueError) as error:
        known = explained(error, model, x)
        if known is None:
            raise
        raise known from error
    if not isinstance(out, Tensor):
        raise UnmovedError(
            f"model {type(model).__name__}: expected logits of shape (B, K), came a {type(out).__name__}; "
            "wrap the model in a module whose forward returns the logits alone"
        )
    if out.ndim != 2 or len(out) != len(x) or out.shape[1] < 2:
        raise UnmovedError(
            f"model {type(model).__name__}: expected logits of shape ({len(x)}, K) with K >= 2, came "
            f"{tuple(out.shape)}; {_to_logits(out, len(x))}"
        )
    return out.float() if out.dtype in (torch.float16, torch.bfloat16) else out


def _to_logits(out: Tensor, size: int) -> str:
    """Say how an output of another shape becomes logits."""
    if out.shape in ((size,), (size, 1)):
        return (
            "of one logit z for two classes make two in a module around it: z = z.flatten(), then "
            "torch.stack([torch.zeros_like(z), z], dim=1), whose softmax is the sigmoid of z"
        )
    return "wrap the model in a module whose forward returns one number for each image and class"


def eval_logits(model: nn.Module, x: Image, *, mode: str = "eval", draws: int = 1) -> Logits:
    """The logits (B, K) that a verdict rests on: in evaluation mode, without a gradient, in float32 (float64 stays).

    Args:
        mode: ``"train"`` leaves every submodule in the mode that it came in, as in `weights.evaluating`.
        draws: of a randomised model, the mean of so many.

    Raises:
        UnmovedError: as `logits`.
    """
    with torch.no_grad(), evaluating(model, mode), float32_only(x.device):
        return torch.stack([logits(model, x) for _ in range(draws)]).mean(dim=0)


def ranked_wrong(values: Logits, y: Label) -> Tensor:
    """Rank the wrong classes by falling logit, (B, K - 1) int64."""
    is_true = torch.zeros_like(values, dtype=torch.bool).scatter_(1, y[:, None], True)
    return values.masked_fill(is_true, -torch.inf).sort(dim=1, descending=True, stable=True).indices[:, :-1]


class Views:
    """The clean and the adversarial view of one batch.

    ``Views(model, batch, x_adv)`` computes logits when they are first asked for. Without ``x_adv`` the adversarial view
    is the clean one. ``Views.of(y=..., clean=..., adv=...)`` takes ready logits. Labels that the logits have no column
    for are refused with the first logits of a batch.

    Images that are mixed of two have two labels. A term sees one at a time: `unmixed` gives the views of each.

    Attributes:
        y: (B,) int64 labels.
        other, share: (B,) the second labels and the shares of the first, as in `Batch`; None where nothing is mixed.
        index: (B,) int64 identities.
        clean: (B, K) logits of the clean images.
        adv: (B, K) logits of the adversarial images.
    """

    def __init__(self, model: nn.Module, batch: Batch, x_adv: Image | None = None) -> None:
        self._model: nn.Module | None = model
        self._batch: Batch | None = batch
        self._x_adv = x_adv
        self._base: Views | None = None
        self._mixed: Views | None = None
        self._clean: Logits | None = None
        self._constant: Logits | None = None
        self._adv: Logits | None = None
        self._target: Label | None = batch.target
        self._fits = False
        self._y: Label = batch.y
        self.other: Label | None = batch.other
        self.share: PerSample | None = batch.share
        self.index: Index = batch.index

    @classmethod
    def of(
        cls,
        *,
        y: Label,
        clean: Logits | None = None,
        adv: Logits | None = None,
        index: Index | None = None,
        target: Label | None = None,
        other: Label | None = None,
        share: PerSample | None = None,
    ) -> Views:
        """Make views of ready logits (B, K), for tests and for users' own loops."""
        views = cls.__new__(cls)
        views._model = views._batch = views._x_adv = views._base = views._mixed = None
        views._clean, views._constant, views._adv = clean, None, adv
        views._y, views._target, views._fits = y, target, False
        views.other, views.share = other, share
        views.index = torch.arange(len(y), device=y.device) if index is None else index
        for name, value in (("clean", clean), ("adv", adv)):
            if value is not None and (value.ndim != 2 or len(value) != len(y)):
                raise UnmovedError(f"Views.of {name}: expected ({len(y)}, K) logits, came {tuple(value.shape)}")
            if value is not None:
                views._fit(value)
        return views

    def at(self, x_adv: Image, logits: Logits | None = None) -> Views:
        """Return views of the batch with other adversarial images; clean logits are computed once and constant.

        Args:
            logits: (B, K) of these images, where they are known already.
        """
        views = Views(self.model, self.batch, x_adv)
        views._adv = logits
        views._base, views._target, views._fits = self, self._target, self._fits
        return views

    def take(self, which: Tensor) -> Views:
        """Select samples by a mask or by positions, with the clean logits already computed."""
        views = Views(self.model, self.batch.take(which), None if self._x_adv is None else self._x_adv[which])
        views._base, views._fits = None if self._base is None else self._base.take(which), self._fits
        views._clean = None if self._clean is None else self._clean[which]
        views._constant = None if self._constant is None else self._constant[which]
        views._adv = None if self._adv is None else self._adv[which]
        views._target = None if self._target is None else self._target[which]
        return views

    def aim(self, target: Label) -> Views:
        """Return the same views with ``target`` (B,) as the class to aim at."""
        views = copy.copy(self)
        views._target = target
        return views

    def unmixed(self) -> tuple[Self, Self]:
        """Return the same views with the first labels alone, and with the second alone; they share the logits.

        `preconditions.values_of` mixes the values of a term by ``share``. Of cross-entropy that is the value for the
        mixed label of Yun et al. 2019 (CutMix), eq. (1).
        """
        return self._labelled(self._y), self._labelled(self._y if self.other is None else self.other)

    def _labelled(self, y: Label) -> Self:
        views = copy.copy(self)
        views._mixed, views._y, views.other, views.share = self, y, None, None
        views._batch = None if self._batch is None else replace(self._batch, y=y, other=None, share=None)
        return views

    @property
    def y(self) -> Label:
        """The labels.

        Raises:
            UnmovedError: images mixed of two, which have two.
        """
        if self.share is not None:
            raise UnmovedError(
                "views: expected one label a sample, but these images are mixed of two (Batch.other); the value of a "
                "term on them is Sum((1, term))(views), which asks it about each label"
            )
        return self._y

    @property
    def model(self) -> nn.Module:
        """The model behind the logits.

        Raises:
            UnmovedError: these are `Views.of` ready logits.
        """
        if self._model is None:
            raise UnmovedError("these views are ready logits: make them with Views(model, batch) to have a model")
        return self._model

    @property
    def batch(self) -> Batch:
        """The batch behind the logits; raises as `model` does."""
        if self._batch is None:
            raise UnmovedError("these views are ready logits: make them with Views(model, batch) to have images")
        return self._batch

    @property
    def x(self) -> Image:
        """The clean images; raises as `model` does."""
        return self.batch.x

    @property
    def target(self) -> Label:
        """(B,) the class that is aimed at: the batch's, or the wrong class with the highest clean logit."""
        if self._target is None:
            self._target = ranked_wrong(self._constant_clean(), self.y)[:, 0]
        return self._target

    @property
    def clean(self) -> Logits:
        if self._mixed is not None:
            return self._mixed.clean
        if self._clean is None:
            if self._base is not None:
                self._clean = self._base._constant_clean()
            elif self._model is not None and self._batch is not None:
                self._clean = logits(self._model, self._batch.x)
                self._fit(self._clean)
            else:
                raise UnmovedError("this term needs the clean logits: pass Views.of(..., clean=logits)")
        return self._clean

    def _constant_clean(self) -> Logits:
        """The clean logits without a graph; they do not take the graph from ``clean``, nor hand it on."""
        if self._mixed is not None:
            return self._mixed._constant_clean()
        if self._constant is None:
            if self._clean is not None or self._base is not None or self._model is None:
                self._constant = self.clean.detach()
            else:
                with torch.no_grad(), frozen_buffers(self.model):  # it is no view that anything is trained on
                    self._constant = logits(self.model, self.batch.x)
                self._fit(self._constant)
        return self._constant

    @property
    def adv(self) -> Logits:
        if self._mixed is not None:
            return self._mixed.adv
        if self._adv is None:
            if self._model is None:
                raise UnmovedError("this term needs the adversarial logits: pass Views.of(..., adv=logits)")
            self._adv = self.clean if self._x_adv is None else logits(self._model, self._x_adv)
            self._fit(self._adv)
        return self._adv

    def _fit(self, logits: Logits) -> None:
        """Check once for a batch, before logits are indexed, that each label and target class has a logit."""
        if self._fits:
            return
        require_labels(self._y, logits.shape[1])
        if self.other is not None:
            require_labels(self.other, logits.shape[1], "Batch.other")
        if self._target is not None:
            require_labels(self._target, logits.shape[1], "Batch.target")
        self._fits = True
        if self._base is not None:
            self._base._fits = True

    def has(self, view: str) -> bool:
        """Return whether the logits of ``"clean"`` or ``"adv"`` are computed already: reading them costs no pass."""
        if self._mixed is not None:
            return self._mixed.has(view)
        return (self._clean if view == "clean" else self._adv) is not None

    def logits(self, view: str) -> Logits:
        """Return the logits of ``"clean"`` or ``"adv"``."""
        require_choice("view", view, ("clean", "adv"))
        return self.clean if view == "clean" else self.adv
