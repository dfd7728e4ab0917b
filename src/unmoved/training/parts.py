"""Build the objects of a training: the model, its optimizer and schedule, the terms that learn, and the engine."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from unmoved.core import collectives, weights
from unmoved.core import precision as formats
from unmoved.core.phases import Phases
from unmoved.core.protocols import StatefulTerm
from unmoved.core.split_batches import one_pass
from unmoved.terms.sum import stateful
from unmoved.training import averaging, distributed, resuming
from unmoved.training.optim import Groups
from unmoved.training.plan import Plan
from unmoved.training.rehearsal import require_optimizer, require_steps, require_trained
from unmoved.training.state import Settings
from unmoved.training.store import Store
from unmoved.training.trainer import TrainerState

if TYPE_CHECKING:
    from lightning_fabric import Fabric

Item = TypeVar("Item")


@dataclass(frozen=True)
class Parts:
    """Hold the objects of one training.

    Attributes:
        model: the bare module, on the engine's device.
        attacked: ``model``, or what ``torch.compile`` made of it.
        wrapped: ``attacked``, as the engine runs it.
        optimizer: steps the model and the terms that learn.
        wrapped_optimizer: ``optimizer``, as the engine steps it.
        scheduler: the schedule of the learning rate.
        terms: the terms that learn or remember, each once.
        settings: those that a later call must share in order to resume.
        fabric: the engine.
        precision: ``"float32"`` or ``"bf16"``.
    """

    model: nn.Module
    attacked: nn.Module
    wrapped: nn.Module
    optimizer: Optimizer
    wrapped_optimizer: Optimizer
    scheduler: LRScheduler
    terms: list[StatefulTerm]
    settings: Settings
    fabric: Fabric
    precision: str

    @property
    def parameters(self) -> list[nn.Parameter]:
        """Return all parameters that the optimizer steps."""
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def backward(self, loss: Tensor) -> None:
        """Compute the gradients of a loss, and average those of the terms over the processes, which DDP does not do."""
        self.fabric.backward(loss)
        collectives.average([p.grad for term in self.terms for p in term.parameters() if p.grad is not None])

    def state(
        self, phases: Phases, average: averaging.Average | None, run: Store | None, checkpoint_share: float
    ) -> TrainerState:
        """Make the state that is saved and restored."""
        return TrainerState(
            self.model,
            self.optimizer,
            self.scheduler,
            nn.ModuleList(self.terms),
            _unique(method.attack for _, method in phases.phases),
            run,
            None if average is None else average.model,
            checkpoint_share,
            self.settings,
        )


def build(
    model: nn.Module, plan: Plan, fabric: Fabric, *, precision: str, compiled: bool, sync_batchnorm: bool
) -> Parts:
    """Build the parts of a training on the engine's device.

    Raises:
        UnmovedError: an optimizer or a schedule that the training cannot step; an unknown precision; in several
            processes, attacks as in `distributed.require_lockstep`.
    """
    if fabric.world_size > 1:
        distributed.require_lockstep(plan.phases, sync_batchnorm)
    precision = formats.resolve(precision, fabric.device)
    terms = _unique(term for _, method in plan.phases.phases for term in stateful(method.objective))
    fabric.to_device(nn.ModuleList(terms))
    if sync_batchnorm:
        model = distributed.synchronized(model, fabric)
    form = formats.memory_format_for(model, fabric.device, next(one_pass(plan.split, 2)).x)
    model.to(memory_format=form)  # type: ignore[call-overload]  # the same numbers
    optimizer = _optimizer(model, terms, plan)
    groups = resuming.groups_of(optimizer)  # before a schedule has changed its numbers
    scheduler = plan.schedule(optimizer, plan.steps, plan.steps_per_epoch)
    require_steps(scheduler, plan.average, plan.steps)
    settings: Settings = {
        "epochs": plan.epochs,
        "batch_size": plan.batch_size,
        "samples": len(plan.split),
        "optimizer": groups,
        "schedule": resuming.name_of(scheduler),
    }
    attacked: Any = torch.compile(model) if compiled else model
    with weights.constant_beside(optimizer, model):  # several processes wait for the gradients that are asked for here
        wrapped, wrapped_optimizer = fabric.setup(attacked, optimizer)
    return Parts(model, attacked, wrapped, optimizer, wrapped_optimizer, scheduler, terms, settings, fabric, precision)


def _optimizer(model: nn.Module, terms: list[StatefulTerm], plan: Plan) -> Optimizer:
    """Make the optimizer of the model's parameters and, without weight decay, of those of the terms."""
    groups: Groups = [{"params": list(model.parameters())}]
    learned = list(nn.ModuleList(terms).parameters())
    if learned:
        groups.append({"params": learned, "weight_decay": 0.0})
    optimizer = plan.optimizer(groups)
    require_optimizer(optimizer)
    require_trained(model, optimizer)
    return optimizer


def _unique(items: Iterable[Item | None]) -> list[Item]:
    return list({id(item): item for item in items if item is not None}.values())
