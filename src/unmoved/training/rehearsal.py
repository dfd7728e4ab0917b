"""Try a step of each phase and the validation before training, so that errors show at once and not epochs later."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import itertools
import json
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from unmoved.core import weights
from unmoved.core.batch import Batch
from unmoved.core.errors import UnmovedError, require_number
from unmoved.core.phases import Phases, resolve
from unmoved.core.precision import autocast
from unmoved.core.preconditions import require_labels
from unmoved.core.protocols import Split, StatefulAttack, parts_of
from unmoved.core.split_batches import one_pass, require_distinct
from unmoved.core.threat import bounds_of
from unmoved.core.views import logits
from unmoved.evaluation import judge
from unmoved.terms.sum import stateful
from unmoved.training.plan import Plan
from unmoved.training.step import Diverged, train_step
from unmoved.training.validation import Validation

EARLY = 1e-3  # where in a phase its step is tried: a ramp that begins at zero is above zero there
_CONTAINERS = (dict, OrderedDict, list, set, deque)


class _Still(torch.optim.Optimizer):
    """An optimizer that takes no step and has no state."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        super().__init__([{"params": parameters, "lr": 0.0}], {})

    def step(self, closure: object = None) -> None:  # type: ignore[override]
        """Do nothing."""


def rehearse_training(
    model: nn.Module,
    plan: Plan,
    held_out: Validation | None,
    *,
    device: torch.device,
    count: int = 1,
    precision: str = "float32",
    parameters: list[nn.Parameter] | None = None,
) -> None:
    """Call everything once that a training will call; afterwards all objects are as they were.

    Args:
        count: processes that take shares of each batch.
        parameters: as `rehearse`.

    Raises:
        UnmovedError: as `smallest_batch`, `rehearse` and `rehearse_validation`; a label beyond the logits, checked
            for all samples if the split holds its labels in memory.
    """
    batch = smallest_batch(plan.split, plan.batch_size, count).to(device)
    with as_found(model), torch.no_grad(), weights.evaluating(model), autocast(precision, device):
        num_classes = logits(model, batch.x).shape[1]
    labels = getattr(plan.split, "labels", None)
    if isinstance(labels, torch.Tensor):
        require_labels(labels, num_classes)
    rehearse(
        model, plan.phases, batch, parameters=parameters, precision=precision, augment=plan.augment, seed=plan.seed
    )
    if held_out is not None:
        rehearse_validation(model, held_out)


def rehearse(
    model: nn.Module,
    phases: Phases,
    batch: Batch,
    *,
    parameters: list[nn.Parameter] | None = None,
    precision: str = "float32",
    augment: Callable[[Batch, int], Batch] | None = None,
    seed: int = 0,
) -> None:
    """Take one step of each phase in training mode, its attack included; afterwards everything is as it was.

    Args:
        model: on the device of the batch.
        phases: each is tried, with its ramps near their start.
        batch: as returned by `smallest_batch`.
        parameters: those that the optimizer steps; None for all.
        precision: as in `train_step`.
        augment: (batch, seed) -> batch.
        seed: keys the augmentation.

    Raises:
        UnmovedError: what `train_step` refuses.
    """
    bounds = bounds_of_phases(phases)
    for _, method in phases.phases:
        terms = list(stateful(method.objective))
        owned = [*model.parameters(), *(p for term in terms for p in term.parameters())]
        # A frozen value has no state, so that trying it is harmless; a user's own function may have.
        defense = method.defense if dataclasses.is_dataclass(method.defense) else None
        tried = dataclasses.replace(resolve(method, EARLY), defense=defense)
        with as_found(model, *terms, method.attack), weights.in_training(model) as (train_mode, _):
            train_mode()
            seen = batch if augment is None else augment(batch, seed)
            if not isinstance(seen, Batch):
                raise UnmovedError(
                    f"augment: expected it to return a Batch, came {type(seen).__name__}; use "
                    "dataclasses.replace(batch, x=...)"
                )
            optimizer = _Still(owned if parameters is None else parameters)
            try:
                train_step(model, tried, optimizer, seen, precision, bounds=bounds)
            except Diverged as error:
                raise UnmovedError(
                    f"{error}, before anything is trained, on {len(seen)} samples, as many as the last batch of an "
                    "epoch has; look for NaN in the weights, or for a term or layer that needs more samples"
                ) from error
            for term in terms:
                _require_report(term.report(), type(term).__name__)


def _require_report(report: object, name: str) -> None:
    try:
        json.dumps(report)
    except (TypeError, ValueError) as error:
        raise UnmovedError(
            f"term {name}: expected its report() to be of numbers, texts, lists and dicts, which the log takes; {error}"
        ) from error


def bounds_of_phases(phases: Phases) -> tuple[float, float] | None:
    """Return the smallest and largest pixel value, which phases without an attack take from the others."""
    return next(filter(None, (bounds_of(method.attack) for _, method in phases.phases)), None)


def rehearse_validation(model: nn.Module, held_out: Validation) -> None:
    """Read all of a validation's data and run its attack on two samples, as `judge.evaluate` does.

    Afterwards everything is as before.

    Raises:
        UnmovedError: what the judge refuses.
    """
    batches = judge.checked_batches(model, held_out.split, 256, held_out.threat)
    first = next(batches)
    batch = first.take(torch.arange(min(2, len(first)), device=first.y.device))
    with as_found(model, held_out.check):
        num_classes = judge.predicted(model, batch.x, batch.y)[1]
        index = []
        for each in itertools.chain([first], batches):
            require_labels(each.y, num_classes, "labels of the validation")
            index.append(each.index.cpu())
            require_distinct(torch.cat(index[:2]))
        require_distinct(torch.cat(index))
        for name, part in parts_of("validation", held_out.check, num_classes).items():
            judge.propose(model, part, batch, held_out.threat, name)


def smallest_batch(split: Split, size: int, count: int = 1) -> Batch:
    """Return a batch as large as an epoch's smallest, in batches of ``size`` that ``count`` processes share.

    Raises:
        UnmovedError: a split that yields no `Batch`, or numbers the samples of each batch from 0.
    """
    last = (len(split) - 1) % size + 1
    batches = one_pass(split, max(last // count, 1))
    first = next(batches)
    second = next(batches, first)
    require_distinct(torch.cat([first.index.cpu(), *([] if second is first else [second.index.cpu()])]))
    return first


@contextmanager
def as_found(*things: object) -> Iterator[None]:
    """Restore models, terms, attacks and torch's random state after the block.

    Weights, gradients, buffers and attributes are restored, and the contents of lists, sets and dictionaries. Objects
    that cannot be copied are left out.
    """
    modules = list({id(m): m for t in things if isinstance(t, nn.Module) for m in t.modules()}.values())
    parameters = list({id(p): p for m in modules for p in m.parameters(recurse=False)}.values())
    values = [p.detach().clone() for p in parameters]
    gradients = [p.grad for p in parameters]
    states = [(t, copy.deepcopy(t.state_dict())) for t in things if isinstance(t, StatefulAttack)]
    holders = [*modules, *(t for t in things if not isinstance(t, nn.Module))]
    restores = [_attributes(holder) for holder in holders]
    cuda = sorted({p.device.index for p in parameters if p.device.type == "cuda"})
    try:
        for p in parameters:
            p.grad = None
        with ExitStack() as kept, torch.random.fork_rng(cuda):
            for thing in things:
                if isinstance(thing, nn.Module):
                    kept.enter_context(weights.frozen_buffers(thing))
            yield
    finally:
        for restore in restores:
            restore()
        for thing, state in states:
            thing.load_state_dict(state)
        weights.write(list(zip(parameters, values, strict=True)))
        torch.clear_autocast_cache()
        for p, gradient in zip(parameters, gradients, strict=True):
            p.grad = gradient


def _attributes(thing: object) -> Callable[[], None]:
    """Return a function that restores an object's attributes and the contents of its lists, sets and dictionaries."""
    now: dict[str, Any] = getattr(thing, "__dict__", {})
    before = dict(now)
    contents = [(value, copy.copy(value)) for value in before.values() if type(value) in _CONTAINERS]

    def restore() -> None:
        now.clear()
        now.update(before)
        for value, old in contents:
            value.clear()
            (value.update if isinstance(value, dict | set) else value.extend)(old)

    return restore


def require_trained(model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> None:
    """Raise `UnmovedError` if nothing would be trained: no parameters, all frozen, or none in the optimizer."""
    kind = f"model {type(model).__name__}"
    if next(model.parameters(), None) is None:
        raise UnmovedError(f"{kind}: expected parameters to train, came none; evaluate and attacks take it as it is")
    if not weights.trainable(model):
        raise UnmovedError(
            f"{kind}: expected parameters to train, but all are frozen; use requires_grad_(True) on the part that "
            "is to learn"
        )
    if optimizer is not None and not weights.trainable(model, optimizer):
        raise UnmovedError(
            "optimizer: expected one that steps parameters of the model, came one that holds none of them (copies, or "
            f"those of another model); make it of the groups that it is called with, as optim.SGD() does, for {kind}"
        )


def require_optimizer(optimizer: object) -> None:
    """Raise `UnmovedError` unless this is an optimizer whose ``step`` needs no arguments."""
    if not isinstance(optimizer, torch.optim.Optimizer) or not _can_call(optimizer.step):
        raise UnmovedError(
            f"optimizer: expected a function that returns a torch.optim.Optimizer whose step() needs no closure, "
            f"came {type(optimizer).__name__}; use optim.SGD(...) or lambda groups: torch.optim.SGD(groups)"
        )


def require_steps(scheduler: object, average: Callable[[int, int], float] | None, total: int) -> None:
    """Raise `UnmovedError` unless ``total`` steps can be taken with this schedule and average."""
    if not isinstance(scheduler, torch.optim.lr_scheduler.LRScheduler) or not _can_call(scheduler.step):
        raise UnmovedError(
            "schedule: expected a function that returns a torch.optim.lr_scheduler whose step() needs no measure, came "
            f"{type(scheduler).__name__}; use optim.Cosine() or a function such as lambda optimizer, total, per_epoch: "
            "StepLR(optimizer, per_epoch)"
        )
    steps = getattr(scheduler, "total_steps", None)
    if isinstance(steps, int) and steps < total:
        raise UnmovedError(f"schedule: expected one of {total} steps, came {steps}; pass total_steps=total")
    if average is not None:
        require_number("average(step, total)", average(0, total), at_least=0, at_most=1)


def _can_call(function: Callable[..., object]) -> bool:
    try:
        inspect.signature(function).bind()
    except TypeError:
        return False
    return True
