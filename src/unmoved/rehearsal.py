"""A rehearsal: what a method would refuse in its first step, it refuses before training."""

from __future__ import annotations

import copy
import dataclasses

import torch
from torch import Tensor, nn

from unmoved.defenses import Plain
from unmoved.protocols import Batch
from unmoved.schedule import Phases
from unmoved.terms.sum import Sum, as_sum, stateful
from unmoved.views import Views
from unmoved.weights import evaluating


def rehearse(model: nn.Module, phases: Phases, batch: Batch) -> None:
    """Each phase's objective and defense on two samples and a copy: what they refuse, they refuse before training."""
    twin = copy.deepcopy(model)
    for start, _ in phases.phases:
        method = phases.at(start, start + 1)
        objective = as_sum(copy.deepcopy(method.objective))
        learned = [p for term in stateful(objective) for p in term.parameters()]

        def backward(objective: Sum = objective) -> Tensor:
            loss = objective(Views(twin, batch, batch.x)).mean()
            loss.backward()
            return loss.detach()

        # A frozen value remembers nothing, so that trying it is harmless; a stranger's function might not be.
        defense = method.defense if dataclasses.is_dataclass(method.defense) else Plain()
        with evaluating(twin), torch.random.fork_rng(devices=[]):
            defense(twin, torch.optim.SGD([*twin.parameters(), *learned], lr=0.0), backward)
