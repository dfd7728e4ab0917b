"""Compare the strength of our attack and the reference's, by the final loss over several starts of each.

A single start scatters by a hundredth or two, which is as much as the bar of 0.98 allows.
"""

from __future__ import annotations

import statistics
from dataclasses import replace

import reference
import torch
from torch import nn
from torch.nn import functional as F

from unmoved import Batch, attacks, terms
from unmoved.core import precision as formats

STARTS = 5


def strength(model: nn.Module, batch: Batch, attack: attacks.PGD, precision: str) -> list[float]:
    """The loss at the end of each start of ours, over the mean of as many starts of the reference's, all in float32.

    The loss is KL to the clean prediction where the attack is on it, as TRADES' is, and cross-entropy otherwise.
    """
    device, eps, is_kl = batch.x.device, attack.threat.radius, isinstance(attack.loss, terms.KL)
    with formats.float32_only(device), torch.no_grad():
        clean = F.softmax(model.eval()(batch.x), 1)

    def reached(x_adv: torch.Tensor) -> float:
        with formats.float32_only(device), torch.no_grad():
            log_p = F.log_softmax(model.eval()(x_adv.float()), 1)  # the reference leaves it in training mode
            return float(F.kl_div(log_p, clean, reduction="batchmean") if is_kl else F.nll_loss(log_p, batch.y))

    ours, theirs = [], []
    for seed in range(STARTS):
        torch.manual_seed(seed)
        with formats.float32_only(device):
            if is_kl:
                found = reference.trades_attack(model, batch.x, eps, attack.steps)
            else:
                found = reference.ce_attack(model, batch.x, batch.y, reference.uniform(batch.x, eps), eps, attack.steps)
        theirs.append(reached(found))
        with formats.autocast(precision, device):
            ours.append(reached(replace(attack, seed=seed)(model.eval(), batch)))
    return [value / statistics.fmean(theirs) for value in ours]
