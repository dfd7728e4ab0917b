"""Compute the divergence between the predictions for the clean and the adversarial image; make TRADES of it."""

from __future__ import annotations

from dataclasses import dataclass

from torch.nn import functional as F

from unmoved.core.batch import PerSample
from unmoved.core.phases import Ramp
from unmoved.core.views import Views
from unmoved.terms.cross_entropy import CE
from unmoved.terms.masked import expectation
from unmoved.terms.sum import Sum


@dataclass(frozen=True)
class KL:
    """Divergence of the adversarial prediction from the clean one.

    ``KL(p || p') = sum_c p_c (log p_c - log p'_c)``, p of the clean and p' of the adversarial view.

    The gradient flows through both arguments, as in the authors' code. TRADES: Zhang et al. 2019, eq. (5) with the
    KL surrogate of section 3.3. A class that the clean logits rule out with minus infinity adds nothing.
    """

    def __call__(self, views: Views) -> PerSample:
        log_p = F.log_softmax(views.clean, dim=1)
        log_q = F.log_softmax(views.adv, dim=1)
        return expectation(log_p, log_p - log_q)


def TRADES(beta: float | Ramp = 6.0) -> Sum:
    """TRADES: cross-entropy of the clean view plus beta times the divergence between the views.

    ``CE(p, y) + beta * KL(p || p')``. Zhang et al. 2019; ``beta`` is their 1/lambda. Their attack maximises the KL
    from a start of 0.001 N(0, I): ``PGD(threat, loss=KL(), start="gaussian")``.

    Deviations: the clean images are passed once (their code passes them once for each of the two terms, so that
    BatchNorm's statistics move once more and dropout draws twice).
    """
    return Sum((1.0, CE("clean")), (beta, KL()))
