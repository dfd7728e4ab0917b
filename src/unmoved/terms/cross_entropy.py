"""Compute cross-entropy, the term of Madry's adversarial training and of ordinary training."""

from __future__ import annotations

from dataclasses import dataclass

from torch.nn import functional as F

from unmoved.core.batch import PerSample
from unmoved.core.errors import number_field, require_choice
from unmoved.core.views import Views
from unmoved.terms.masked import ruled_out

VIEWS = ("clean", "adv")


@dataclass(frozen=True)
class CE:
    """Cross-entropy of one view with the label.

    ``-sum_c t_c log p_c`` with ``t = (1 - s) onehot(y) + s / K``.

    Args:
        view: ``"adv"`` (Madry et al. 2018, eq. 2.1) or ``"clean"``.
        label_smoothing: s in [0, 1). Note that smoothing is a known masker of gradients: do not judge by PGD alone.

    Raises:
        UnmovedError: an unknown view or a smoothing outside [0, 1].
    """

    view: str = "adv"
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        require_choice("CE.view", self.view, VIEWS)
        number_field(self, "CE.label_smoothing", at_least=0, at_most=1)

    def __call__(self, views: Views) -> PerSample:
        z = views.logits(self.view)
        cross_entropy = F.cross_entropy(z, views.y, reduction="none")
        if not self.label_smoothing:
            return cross_entropy
        out = ruled_out(z)  # K counts the classes that are not, and their log p is what the rest of the mass meets
        uniform = -F.log_softmax(z, dim=1).masked_fill(out, 0.0).sum(dim=1) / (~out).sum(dim=1)
        return (1 - self.label_smoothing) * cross_entropy + self.label_smoothing * uniform
