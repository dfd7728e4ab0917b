"""Handle logits of minus infinity: a class that the model rules out counts as one that it does not have.

Its probability is exactly zero, and 0 log 0 = 0. Written as a product, ``0 * -inf`` would be NaN in the value and in
the gradient, so such entries are replaced before they are multiplied.
"""

from __future__ import annotations

import torch
from torch import Tensor

from unmoved.core.batch import Logits, PerSample


def ruled_out(logits: Logits) -> Tensor:
    """Return where a logit is minus infinity, (B, K) bool; NaN is not."""
    return logits == -torch.inf


def expectation(log_p: Tensor, values: Tensor) -> PerSample:
    """Compute ``sum_c p_c v_c`` over the classes with ``log p_c > -inf``, (B,)."""
    return (log_p.exp() * values.masked_fill(ruled_out(log_p), 0.0)).sum(dim=1)
