"""Compute ProbsCut's global constraint, which draws every sample of a class to one probability."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unmoved.core import collectives
from unmoved.core.batch import Logits, PerSample
from unmoved.core.errors import UnmovedError, require_choice, require_number, require_whole
from unmoved.core.protocols import StatefulTerm
from unmoved.core.views import Views

DIVERGENCES = ("generalized", "bernoulli", "qp", "pq")
THETA_BOUND = 6.0
LEAST = 1e-6  # probabilities are kept this far from 0 and 1, so that their logarithms are finite


class GlobalProbability(StatefulTerm):
    """ProbsCut's global constraint, a reconstruction: each sample's p_y is drawn to a value learned for its class.

    ``G_i = D(q_{y_i}, s_i)`` with ``s_i`` the probability of the true class and ``q = sigmoid(theta)``:

    - ``generalized``: ``q log(q / s) - q + s`` (zero iff s = q; near it (s - q)^2 / 2q, so a penalty on the variance);
    - ``bernoulli``: ``q log(q / s) + (1 - q) log((1 - q) / (1 - s))``;
    - ``qp``: ``q log(q / s)`` and ``pq``: ``s log(s / q)``, the literal one-element divergences.

    **Published** (release of *Frontiers of Computer Science*, 15 April 2026): a single-element KL divergence draws the
    target-class probability to a globally optimal expected probability of each category, learned with the parameters,
    and can be added to TRADES and MART. **Reconstructed here**: the form of the divergence, which view it sees, how q
    is updated, and every default. ``qp`` and ``pq`` are kept for fidelity; they do not shrink the gap (docs).

    Args:
        num_classes: K.
        divergence: one of the four above.
        update: ``"gradient"``: theta is a parameter of the optimizer (no weight decay), kept in [-6, 6]; ``"ema"``:
            after each step ``q_c <- m q_c + (1 - m) mean(s_i of class c)`` for the classes present, where the objective
            computed the view.
        view: ``"adv"``, ``"clean"`` or ``"both"`` (the mean of the two probabilities).
        init: starting value of every q_c, where theta is in [-6, 6]: 0.0025 to 0.9975.
        momentum: m of ``"ema"``.

    Raises:
        UnmovedError: a value outside its bounds, or logits of another number of classes.
    """

    def __init__(
        self,
        num_classes: int,
        divergence: str = "generalized",
        update: str = "gradient",
        view: str = "adv",
        init: float = 0.5,
        momentum: float = 0.99,
    ) -> None:
        super().__init__()
        num_classes = require_whole("GlobalProbability.num_classes", num_classes, at_least=2)
        require_choice("GlobalProbability.divergence", divergence, DIVERGENCES)
        require_choice("GlobalProbability.update", update, ("gradient", "ema"))
        require_choice("GlobalProbability.view", view, ("adv", "clean", "both"))
        least = 1 / (1 + math.exp(THETA_BOUND))
        init = require_number("GlobalProbability.init", init, at_least=least, at_most=1 - least)
        momentum = require_number("GlobalProbability.momentum", momentum, at_least=0, at_most=1)
        self.num_classes, self.divergence, self.how = num_classes, divergence, update
        self.view, self.init, self.momentum = view, init, momentum
        theta = torch.full((num_classes,), math.log(init / (1 - init)))
        if update == "gradient":
            self.theta = nn.Parameter(theta)
        else:
            self.register_buffer("theta", theta)
        # Per class: count, sum and sum of squares of p_y since the last report, for the clean and adversarial view.
        self.seen: Tensor
        self.register_buffer("seen", torch.zeros(2, 3, num_classes, dtype=torch.float64), persistent=False)

    def __repr__(self) -> str:
        return (
            f"GlobalProbability({self.num_classes}, divergence={self.divergence!r}, update={self.how!r}, "
            f"view={self.view!r}, init={self.init!r}, momentum={self.momentum!r})"
        )

    @property
    def q(self) -> Tensor:
        """Return the expected probability of each class, (K,)."""
        return torch.sigmoid(self.theta)

    def forward(self, views: Views) -> PerSample:
        s = self._target_probability(views).clamp(LEAST, 1 - LEAST)
        q = self.q[views.y].to(s.dtype)
        if self.divergence == "generalized":
            return q * torch.log(q / s) - q + s
        if self.divergence == "bernoulli":
            return q * torch.log(q / s) + (1 - q) * torch.log((1 - q) / (1 - s))
        return q * torch.log(q / s) if self.divergence == "qp" else s * torch.log(s / q)

    def _target_probability(self, views: Views) -> PerSample:
        if self.view == "both":
            return (self._p_true(views.clean, views) + self._p_true(views.adv, views)) / 2
        return self._p_true(views.logits(self.view), views)

    def _p_true(self, logits: Logits, views: Views) -> PerSample:
        if logits.shape[1] != self.num_classes:
            raise UnmovedError(
                f"GlobalProbability: expected num_classes = {logits.shape[1]}, as the model has, "
                f"came {self.num_classes}"
            )
        return F.softmax(logits, dim=1).gather(1, views.y[:, None]).squeeze(1)

    @torch.no_grad()
    def update(self, views: Views) -> None:
        needed = ("clean", "adv") if self.view == "both" else (self.view,)
        if self.how == "gradient":
            self.theta.clamp_(-THETA_BOUND, THETA_BOUND)
        elif all(map(views.has, needed)):  # while the weight is zero nobody asked, and to ask would move BatchNorm
            count, total = collectives.summed(self._by_class(self._target_probability(views), views, powers=2))
            mean = total / count.clamp_min(1)
            q = torch.where(count > 0, self.momentum * self.q + (1 - self.momentum) * mean, self.q.double())
            self.theta.copy_(torch.logit(q, eps=LEAST))
        for row, name in enumerate(("clean", "adv")):
            if views.has(name):
                p = self._p_true(views.logits(name), views)
                self.seen[row] += collectives.summed(self._by_class(p, views, powers=3))

    def _by_class(self, s: PerSample, views: Views, powers: int) -> Tensor:
        """Sum 1, s, s^2, ... over this process's samples of each class, (powers, K) float64."""
        y, p = collectives.own(views.y), collectives.own(s).double()
        sums = p.new_zeros(powers, self.num_classes)
        return sums.index_add_(1, y, torch.stack([p**power for power in range(powers)]))

    def report(self) -> dict[str, list[float | None]]:
        """Return q, and per class the mean and variance of p_y since the last report, clean and adversarial.

        Both are None for a class without samples, since JSON has no NaN.
        """
        facts: dict[str, list[float | None]] = {"q": self.q.tolist()}
        for row, name in enumerate(("clean", "adv")):
            count, total, square = self.seen[row]
            if count.any():
                mean = total / count
                facts[f"p_{name}_mean"] = _numbers(mean)
                facts[f"p_{name}_variance"] = _numbers((square / count - mean**2).clamp_min(0))
        self.seen.zero_()
        return facts


def _numbers(values: Tensor) -> list[float | None]:
    """Convert to Python's numbers, None in the place of 0 / 0."""
    return [None if math.isnan(value) else value for value in values.tolist()]
