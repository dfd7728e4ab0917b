"""The one training loop. Methods are values handed to it; everything else is files."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from time import monotonic
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from unmoved import models
from unmoved.core import collectives, weights
from unmoved.core import precision as formats
from unmoved.core.batch import Batch
from unmoved.core.errors import UnmovedError, several
from unmoved.core.passes import one_epoch
from unmoved.core.phases import Phases
from unmoved.core.preconditions import require_model, require_split
from unmoved.core.protocols import Attack, Method, Split
from unmoved.core.threat import ThreatModel
from unmoved.terms.sum import snake_case
from unmoved.training import averaging, distributed, resuming
from unmoved.training.optim import SGD, Constant
from unmoved.training.parts import Parts, build
from unmoved.training.plan import Plan
from unmoved.training.rehearsal import bounds_of_phases, rehearse_training, require_trained
from unmoved.training.state import Means, TrainerState
from unmoved.training.step import Diverged, train_step
from unmoved.training.store import Store
from unmoved.training.validation import Validation

if TYPE_CHECKING:
    from lightning_fabric import Fabric

logger = logging.getLogger("unmoved")
ORDER = "train(model, method, split)"
WATCHED = 50  # on a GPU, the loss of one step in so many is looked at


def train(
    model: nn.Module,
    method: Method | Phases | Sequence[tuple[int, Method]],
    split: Split,
    *,
    validation: Split | None = None,
    check: Attack | None = None,
    threat: ThreatModel | None = None,
    epochs: int = 10,
    batch_size: int = 128,
    optimizer: Callable[[list[dict[str, Any]]], Optimizer] = SGD(),  # noqa: B008 - frozen values
    schedule: Callable[[Optimizer, int, int], LRScheduler] = Constant(),  # noqa: B008
    augment: Callable[[Batch, int], Batch] | None = None,
    average: averaging.Averaging | None = None,
    precision: str = "auto",
    compiled: bool = False,
    sync_batchnorm: bool = False,
    seed: int = 0,
    checkpoint_share: float = 0.03,
    device: str = "auto",
    fabric: Fabric | None = None,
    run: Store | None = None,
    progress: Callable[[dict[str, Any]], None] | None = None,
    rehearsal: bool = True,
) -> list[dict[str, Any]]:
    """Train ``model`` in place and return the log, one record an epoch.

    What was found damaged in ``run`` and mended, and which submodules stay in evaluation mode, is logged
    (``logging.getLogger("unmoved")``, as warning and information).

    Args:
        model: images in [0, 1] -> logits. Submodules that come in evaluation mode, such as a BatchNorm that is to keep
            its statistics, stay in it; a model that comes in evaluation mode as a whole is trained as a whole. In the
            end every submodule is in the mode that it came in.
        method: a method, or phases of them ``[(from_epoch, method), ...]``; ramps are resolved at each step.
        split: the training data.
        validation: held-out data that picks the best epoch, attacked by ``check`` within ``threat``; ``check``
            defaults to a 10-step PGD.
        optimizer: parameter groups -> optimizer, such as ``optim.SGD(lr=0.1)``. Parameters that it leaves out are
            constant: no defense moves them, and their ``.grad`` stays what it was.
        schedule: (optimizer, total steps, steps an epoch) -> scheduler, stepped once per optimizer step.
        augment: (batch, seed) -> batch.
        average: `averaging.EMA` or `averaging.SWA`: validate, keep and return the averaged weights.
        compiled: whether ``torch.compile`` makes the passes of the attack and of the objective.
        sync_batchnorm: with several processes on GPUs, BatchNorm over the samples of all of them. Without it each
            normalises its own, and the running statistics are averaged after each step.
        seed: of shuffling, augmentation and the model's own randomness; the caller's random state is left alone.
        device: ``"auto"``, ``"cpu"``, ``"cuda"`` or ``"mps"``.
        fabric: an engine that is launched already, in place of ``device``: one of several processes takes its part of
            each batch, and all of them make the step that one would make. Only the first is given a ``run``.
        checkpoint_share: the share of the time that saving into ``run`` may take, in [0, 1]: what a kill loses was
            trained in about (seconds of a save) / share. 1 saves every epoch; the first and last are always.
        run: where to log and save; if it holds a saved state, training goes on from there. What terms report by class
            is then in ``run.per_class`` too. More epochs are trained where those that are trained already would have
            been the same.
        progress: called with the latest record after each step (``{"epoch", "share"}``) and epoch.
        rehearsal: whether to try a step of each phase first, on as few samples as an epoch's last batch has, and the
            validation on two: what they refuse is then refused before anything is trained. Nothing changes by it.

    Raises:
        UnmovedError: nothing to train, or arguments of other kinds; a value outside its bounds; a loss
            that is not finite (naming the step; what was saved stays); a ``run`` that another process trains or
            evaluates, that was trained with other settings, or whose saved states are all damaged.
    """
    formats.require_device(device)
    require_model(model, ORDER)
    require_split(split, ORDER)
    held_out = Validation.of(validation, check, threat, ORDER)
    plan = Plan(Phases.of(method), split, epochs, batch_size, optimizer, schedule, augment, average, seed)
    require_trained(model)
    bounds = bounds_of_phases(plan.phases)
    fabric = distributed.prepare(device) if fabric is None else fabric
    if fabric.world_size > 1:
        distributed.require_lockstep(plan.phases, sync_batchnorm)
    parts = build(model, plan, fabric, precision=precision, compiled=compiled, sync_batchnorm=sync_batchnorm)
    if run is not None:
        models.require_savable(parts.model.state_dict())
    if rehearsal:
        _rehearse(parts, plan, held_out)
    plan = replace(plan, split=distributed.resident(split, fabric.device))
    averaged = None if plan.average is None else averaging.Average(parts.model, plan.average)
    state = parts.state(plan.phases, averaged, run, checkpoint_share)
    report = _ignore if progress is None else progress
    with (
        nullcontext() if run is None else run.alone(),
        torch.random.fork_rng([fabric.device] if fabric.device.type == "cuda" else []),
        weights.in_training(parts.model) as (train_mode, frozen),
    ):
        if frozen and fabric.global_rank == 0:
            words = "in evaluation mode, as they came, stay %s; model.train() before training thaws them"
            logger.info(words, several(frozen))
        _resume(state, parts, plan)
        for epoch in range(state.epochs, plan.epochs):
            train_mode()  # again in each epoch: a callback may have left another
            began = monotonic()
            record = _epoch(parts, plan, state, averaged, epoch, bounds, report)
            if held_out is not None:
                with _stopping(epoch, state):
                    record |= held_out.accuracy(state.kept, plan.batch_size, fabric)
            reports = {snake_case(type(term).__name__): term.report() for term in parts.terms}
            record |= {"terms": {name: facts for name, facts in reports.items() if facts}}
            state.commit(record, monotonic() - began, last=epoch + 1 == plan.epochs)
            report(state.log[-1])
    if averaged is not None:
        averaged.give(parts.model)
    return state.log


def _ignore(event: dict[str, Any]) -> None:
    """The default of ``progress``."""


def _rehearse(parts: Parts, plan: Plan, held_out: Validation | None) -> None:
    """Try a step of each phase and the validation; see `rehearse_training`."""
    rehearse_training(
        parts.model,
        plan.phases,
        plan.split,
        plan.batch_size,
        device=parts.fabric.device,
        count=parts.fabric.world_size,
        validation=None if held_out is None else held_out.split,
        check=None if held_out is None else held_out.check,
        threat=None if held_out is None else held_out.threat,
        parameters=parts.parameters,
        precision=parts.precision,
        augment=plan.augment,
        seed=plan.seed,
    )


def _resume(state: TrainerState, parts: Parts, plan: Plan) -> None:
    """Bring all parts, in every process, to where the run stands, if this call can go on from there."""
    saved = distributed.broadcast(parts.fabric, state.saved())
    if saved is not None:
        saved = resuming.followed(
            saved,
            parts.settings,
            optimizer=parts.optimizer,
            scheduler=parts.scheduler,
            steps=plan.steps_per_epoch,
            phases=plan.phases,
            average=plan.average,
            where="the run" if state.run is None else str(state.run.path),
        )
    state.restore(saved)


def _epoch(
    parts: Parts,
    plan: Plan,
    state: TrainerState,
    averaged: averaging.Average | None,
    epoch: int,
    bounds: tuple[float, float] | None,
    report: Callable[[dict[str, Any]], None],
) -> dict[str, Any]:
    """Take the steps of one epoch and return its record: number, step, rate, eps, and the means over its samples."""
    fabric, steps, seed, means = parts.fabric, plan.steps_per_epoch, plan.seed_of(epoch), Means()
    torch.manual_seed(seed + fabric.global_rank)  # what a model draws, such as dropout, is not keyed by sample
    for k, batch in enumerate(one_epoch(plan.split, plan.batch_size, seed)):
        batch, share = collectives.Share.of(batch, fabric.global_rank, fabric.world_size)
        batch = replace(batch.to(fabric.device), step=epoch * steps + k)
        batch = batch if plan.augment is None else plan.augment(batch, plan.seed)
        method = plan.phases.at(epoch + k / steps, plan.epochs)
        # On a GPU, to look at every loss would be to wait for every step.
        watch = fabric.device.type == "cpu" or k % WATCHED == 0
        with collectives.sharing(share):
            with _compiling(parts), _stopping(epoch, state):
                step = train_step(
                    parts.wrapped,
                    method,
                    parts.wrapped_optimizer,
                    batch,
                    parts.precision,
                    attacked=parts.attacked,
                    backward=parts.backward,
                    watch=watch,
                    bounds=bounds,
                )
            if share is not None:  # asked anew: a layer may have put another tensor in a buffer's place
                collectives.average([b for b in parts.model.buffers() if b.is_floating_point()])
        losses = {"loss": step.loss, "train_accuracy": step.accuracy}
        means.add(losses, step.parts, len(batch) if share is None else share.own)
        if averaged is not None:
            averaged.follow(parts.model, batch.step, plan.steps)
        parts.scheduler.step()
        if watch:
            report({"epoch": epoch, "share": (k + 1) / steps, "loss": float(step.loss)})
    with _stopping(epoch, state):
        _require_finite(parts.model, batch.step)
    place = {"epoch": epoch + 1, "step": (epoch + 1) * steps, "lr": parts.optimizer.param_groups[0]["lr"]}
    return place | {"eps": _eps(method.attack)} | means.means(partial(distributed.summed, fabric))


def _require_finite(model: nn.Module, step: int) -> None:
    """Raise `Diverged` where a weight is not finite; a GPU is waited for once."""
    if not torch.stack([p.detach().isfinite().all() for p in model.parameters()]).all():
        raise Diverged(f"a weight became NaN or infinite by step {step}")


@contextmanager
def _compiling(parts: Parts) -> Iterator[None]:
    """Name the model where ``torch.compile``, which works at the first pass, cannot build it."""
    try:
        yield
    except RuntimeError as error:
        is_compilers = type(error).__module__.startswith(("torch._dynamo", "torch._inductor"))
        if parts.attacked is parts.model or not is_compilers:
            raise
        words = f"compiled: torch.compile cannot build this model here ({str(error).splitlines()[0]})"
        raise UnmovedError(f"{words}; leave training.compiled out") from error


@contextmanager
def _stopping(epoch: int, state: TrainerState) -> Iterator[None]:
    """Let an `UnmovedError` name the epoch and what is saved."""
    try:
        yield
    except UnmovedError as error:
        raise _stopped(error, epoch, state) from error


def _stopped(error: UnmovedError, epoch: int, state: TrainerState) -> UnmovedError:
    mend = "; try a smaller lr or a ramp of eps" if isinstance(error, Diverged) else ""
    kept = f"; {state.run.path} keeps the state after epoch {state.saved_epochs}" if state.run is not None else ""
    return UnmovedError(f"{error}, in epoch {epoch + 1}: training stopped{kept if state.saved_epochs else ''}{mend}")


def _eps(attack: Attack | None) -> float | None:
    threat = getattr(attack, "threat", None)
    return threat.radius if isinstance(threat, ThreatModel) else None
