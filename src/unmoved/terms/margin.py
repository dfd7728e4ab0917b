"""Compute margins between the true class and the best wrong one, in logits and invariant to their scale."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from unmoved.core.batch import Label, Logits, PerSample
from unmoved.core.errors import UnmovedError, require_choice
from unmoved.core.views import Views
from unmoved.terms.cross_entropy import VIEWS


def best_wrong(values: Tensor, y: Label) -> PerSample:
    """Return ``max_{j != y} values_j``, (B,)."""
    is_true = torch.zeros_like(values, dtype=torch.bool).scatter_(1, y[:, None], True)
    return values.masked_fill(is_true, -torch.inf).max(dim=1).values


def margin(logits: Logits, y: Label) -> PerSample:
    """Return ``max_{j != y} z_j - z_y``, positive where the sample is misclassified, (B,)."""
    return best_wrong(logits, y) - logits.gather(1, y[:, None]).squeeze(1)


@dataclass(frozen=True)
class Margin:
    """Margin of the best wrong logit over the true one, positive where the sample is misclassified.

    ``max_{j != y} z_j - z_y``: the loss of Carlini and Wagner 2017 (their f_6 with kappa = infinity).

    Raises:
        UnmovedError: an unknown view.
    """

    view: str = "adv"

    def __post_init__(self) -> None:
        require_choice("Margin.view", self.view, VIEWS)

    def __call__(self, views: Views) -> PerSample:
        return margin(views.logits(self.view), views.y)


@dataclass(frozen=True)
class DLR:
    """Difference of logits ratio: the margin in units of the gap between the first and the third logit.

    ``-(z_y - max_{j != y} z_j) / (z_(1) - z_(3) + 1e-12)``, z_(k) the k-th largest logit. Croce and Hein 2020, eq. (6):
    invariant to shifts and to scaling of the logits.

    Raises:
        UnmovedError: an unknown view, or fewer than three classes.
    """

    view: str = "adv"

    def __post_init__(self) -> None:
        require_choice("DLR.view", self.view, VIEWS)

    def __call__(self, views: Views) -> PerSample:
        z = views.logits(self.view)
        if z.shape[1] < 3:
            raise UnmovedError(f"DLR needs at least 3 classes, came {z.shape[1]}; use Margin() or CE()")
        top = z.topk(3, dim=1).values
        return margin(z, views.y) / (top[:, 0] - top[:, 2] + 1e-12)


@dataclass(frozen=True)
class TargetedMargin:
    """Margin of the target's logit over the true one: ``z_t - z_y``, with t = ``views.target``.

    Positive where the target beats the true class; the other classes do not count. Unless the attack or the batch
    names a target, it is the wrong class with the highest clean logit.
    """

    def __call__(self, views: Views) -> PerSample:
        return _toward(views)


@dataclass(frozen=True)
class TargetedDLR:
    """Targeted difference of logits ratio: ``-(z_y - z_t) / (z_(1) - (z_(3) + z_(4)) / 2 + 1e-12)``.

    Croce and Hein 2020, eq. (7); z_(k) is the k-th largest logit, t = ``views.target`` as in `TargetedMargin`.

    Raises:
        UnmovedError: fewer than four classes.
    """

    def __call__(self, views: Views) -> PerSample:
        z = views.adv
        if z.shape[1] < 4:
            raise UnmovedError(f"TargetedDLR needs at least 4 classes, came {z.shape[1]}; use TargetedMargin()")
        top = z.topk(4, dim=1).values
        return _toward(views) / (top[:, 0] - (top[:, 2] + top[:, 3]) / 2 + 1e-12)


def _toward(views: Views) -> PerSample:
    z = views.adv
    return (z.gather(1, views.target[:, None]) - z.gather(1, views.y[:, None])).squeeze(1)
