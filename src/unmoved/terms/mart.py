"""Compute MART's terms: a boosted cross-entropy, and a divergence weighted by misclassification."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn import functional as F

from unmoved.core.batch import PerSample
from unmoved.core.errors import require_choice
from unmoved.core.phases import Ramp
from unmoved.core.views import Views
from unmoved.terms.cross_entropy import VIEWS
from unmoved.terms.kl import KL
from unmoved.terms.margin import best_wrong
from unmoved.terms.sum import Sum


@dataclass(frozen=True)
class BoostedCE:
    """Boosted cross-entropy: cross-entropy plus a margin in probabilities.

    ``-log p_y - log(1.0001 - max_{j != y} p_j + 1e-12)``. Wang et al. 2020 (MART), eq. (6), with the constants of the
    authors' code.

    Raises:
        UnmovedError: an unknown view.
    """

    view: str = "adv"

    def __post_init__(self) -> None:
        require_choice("BoostedCE.view", self.view, VIEWS)

    def __call__(self, views: Views) -> PerSample:
        z = views.logits(self.view)
        wrong = best_wrong(F.softmax(z, dim=1), views.y)
        return F.cross_entropy(z, views.y, reduction="none") - torch.log(1.0001 - wrong + 1e-12)


@dataclass(frozen=True)
class MisclassifiedKL:
    """Divergence between the views, weighted by how far the clean image is from being right.

    ``KL(p || p') * (1.0000001 - p_y)``, p of the clean view; the gradient flows through p and through the weight.
    Wang et al. 2020 (MART), eq. (8).

    Deviations: log-softmax instead of the code's ``log(p' + 1e-12)``, which underflows in half precision.
    """

    def __call__(self, views: Views) -> PerSample:
        p_true = F.softmax(views.clean, dim=1).gather(1, views.y[:, None]).squeeze(1)
        return KL()(views) * (1.0000001 - p_true)


def MART(beta: float | Ramp = 5.0) -> Sum:
    """MART: boosted cross-entropy plus beta times the divergence weighted by misclassification.

    ``BoostedCE(p', y) + beta * KL(p || p') (1 - p_y)``; the attack maximises CE. Wang et al. 2020, eq. (11).
    """
    return Sum((1.0, BoostedCE()), (beta, MisclassifiedKL()))
