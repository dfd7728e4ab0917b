"""Compute losses on the distribution over the wrong classes: DRSL, PRSL and related ones."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from unmoved.core import collectives
from unmoved.core.batch import Label, Logits, PerSample
from unmoved.core.errors import UnmovedError, number_field, require_choice, whole_field
from unmoved.core.views import Views
from unmoved.terms.cross_entropy import VIEWS
from unmoved.terms.masked import expectation, ruled_out


def wrong_logits(logits: Logits, y: Label, name: str) -> Tensor:
    """Return the logits of the wrong classes, (B, K-1), in their order.

    Raises:
        UnmovedError: fewer than three classes, where there is no distribution over the wrong ones.
    """
    if logits.shape[1] < 3:
        raise UnmovedError(
            f"{name} needs at least 3 classes, came {logits.shape[1]}: one wrong class has no distribution"
        )
    places = torch.arange(logits.shape[1] - 1, device=logits.device)
    return logits.gather(1, places + (places >= y[:, None]))  # a mask would wait for the device


@dataclass(frozen=True)
class DRSL:
    """Distribution-restrained softmax loss: squared deviations of the wrong logits from their mean.

    ``sum_{j != y} (z_j - m)^2`` with ``m = mean_{j != y} z_j``. Wang et al. 2023 (arXiv 2303.12363), as in the
    authors' class ``NewLoss``; equal to (K-1) times the variance of log p over the wrong classes. They add it to
    cross-entropy on clean images with a coefficient b on the *sum* over the batch: the weight here is b * B
    (b = 0.005 and B = 128 give 0.64).

    Args:
        view: ``"clean"`` or ``"adv"``.
        mean_divisor: ``"K-1"``; ``"K"`` is the authors' vectorised class, whose mean counts a zero for the true class.

    Raises:
        UnmovedError: an unknown value, or fewer than three classes.
    """

    view: str = "clean"
    mean_divisor: str = "K-1"

    def __post_init__(self) -> None:
        require_choice("DRSL.view", self.view, VIEWS)
        require_choice("DRSL.mean_divisor", self.mean_divisor, ("K-1", "K"))

    def __call__(self, views: Views) -> PerSample:
        wrong = wrong_logits(views.logits(self.view), views.y, "DRSL")
        out = ruled_out(wrong)
        count = (~out).sum(dim=1, keepdim=True) + (self.mean_divisor == "K")
        mean = wrong.masked_fill(out, 0.0).sum(dim=1, keepdim=True) / count
        return ((wrong - mean).masked_fill(out, 0.0) ** 2).sum(dim=1)


@dataclass(frozen=True)
class PRSL:
    """Top-K wrong logits drawn together across the batch.

    ``logsumexp_k(t_k) - t_i`` with ``t_i`` the mean of the wrong logits of ranks start..end-1 of sample i. Wang et al.
    2024 (arXiv 2402.03627), as in the authors' class ``PRSL``, which sums over the batch: their b is the weight b * B
    here. It couples the samples: the minimum, log B, is where all t_i agree. Where several processes train, B is the
    whole batch.

    Args:
        view: ``"clean"`` or ``"adv"``.
        start, end: ranks, 0 the largest wrong logit; end is excluded.

    Raises:
        UnmovedError: an unknown view, ranks that are empty or beyond the K-1 wrong classes.
    """

    view: str = "clean"
    start: int = 0
    end: int = 4
    couples_samples = True

    def __post_init__(self) -> None:
        require_choice("PRSL.view", self.view, VIEWS)
        whole_field(self, "PRSL.start", at_least=0)
        whole_field(self, "PRSL.end", at_least=self.start + 1)

    def __call__(self, views: Views) -> PerSample:
        wrong = wrong_logits(views.logits(self.view), views.y, "PRSL")
        if self.end > wrong.shape[1]:
            raise UnmovedError(f"PRSL.end: expected at most {wrong.shape[1]} wrong classes, came {self.end}")
        t = wrong.topk(self.end, dim=1).values[:, self.start :].mean(dim=1)
        return collectives.logsumexp(t) - t


@dataclass(frozen=True)
class LogitSqueeze:
    """Logit squeezing: ``||z||_2``, the length of the logits.

    Kannan et al. 2018, weight 0.5 in the evaluation of Mosbach et al. 2018, who found it to mask gradients: 70.6 %
    under a default attack on MNIST became 5.0 % under a strong one. A baseline, not a defense.

    Raises:
        UnmovedError: an unknown view.
    """

    view: str = "clean"

    def __post_init__(self) -> None:
        require_choice("LogitSqueeze.view", self.view, VIEWS)

    def __call__(self, views: Views) -> PerSample:
        z = views.logits(self.view)
        length: Tensor = torch.linalg.vector_norm(z.masked_fill(ruled_out(z), 0.0), dim=1)
        return length


@dataclass(frozen=True)
class ComplementEntropy:
    """Negative entropy of the renormalised wrong classes.

    ``(1/K) sum_{j != y} r_j log r_j`` with ``r_j = p_j / (1 - p_y)``. Chen et al. 2019 (COT). The authors alternate a
    step on cross-entropy with a step on this.

    Raises:
        UnmovedError: an unknown view, or fewer than three classes.
    """

    view: str = "clean"

    def __post_init__(self) -> None:
        require_choice("ComplementEntropy.view", self.view, VIEWS)

    def __call__(self, views: Views) -> PerSample:
        z = views.logits(self.view)
        return _negative_entropy(wrong_logits(z, views.y, "ComplementEntropy")) / _classes(z)


@dataclass(frozen=True)
class GuidedComplementEntropy:
    """Complement entropy guided by the true class, ``p_y^alpha sum_{j != y} r_j log r_j / log K``.

    Chen et al. 2019 (arXiv 1903.09799); replaces cross-entropy; alpha = 1/3 by default. Its published robustness was
    measured with weak attacks.

    Raises:
        UnmovedError: a negative alpha, an unknown view, or fewer than three classes.
    """

    alpha: float = 1 / 3
    view: str = "clean"

    def __post_init__(self) -> None:
        number_field(self, "GuidedComplementEntropy.alpha", at_least=0)
        require_choice("GuidedComplementEntropy.view", self.view, VIEWS)

    def __call__(self, views: Views) -> PerSample:
        z = views.logits(self.view)
        # exp of alpha log p: a power of a p that underflowed to zero would have an infinite slope.
        guide = (self.alpha * F.log_softmax(z, dim=1).gather(1, views.y[:, None]).squeeze(1)).exp()
        return guide * _negative_entropy(wrong_logits(z, views.y, "GuidedComplementEntropy")) / _classes(z).log()


def _negative_entropy(logits: Logits) -> PerSample:
    log_r = F.log_softmax(logits, dim=1)
    return expectation(log_r, log_r)


def _classes(logits: Logits) -> PerSample:
    """Count the classes that are not ruled out for the sample, (B,)."""
    return (~ruled_out(logits)).sum(dim=1).to(logits.dtype)
