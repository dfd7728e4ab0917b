"""Train a model by a method, epoch by epoch: validate, log, save, and go on after an interruption."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from time import monotonic
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from unmoved import models
from unmoved.core import collectives, weights
from unmoved.core.batch import Batch
from unmoved.core.errors import UnmovedError, several
from unmoved.core.phases import Phases
from unmoved.core.preconditions import require_model, require_split
from unmoved.core.protocols import Attack, Method, Split
from unmoved.core.split_batches import one_epoch
from unmoved.core.threat import ThreatModel
from unmoved.terms.sum import snake_case
from unmoved.training import averaging, distributed, overfitting, resuming
from unmoved.training.log import EpochRecord, Progress
from unmoved.training.optim import SGD, Constant, Groups
from unmoved.training.parts import Parts, build
from unmoved.training.plan import Plan
from unmoved.training.rehearsal import bounds_of_phases, rehearse_training, require_trained
from unmoved.training.step import Diverged, train_step
from unmoved.training.store import Store
from unmoved.training.trainer import TrainerState
from unmoved.training.validation import Validation

if TYPE_CHECKING:
    from lightning_fabric import Fabric

logger = logging.getLogger("unmoved")
ORDER = "train(model, method, split)"
_PART = "parts."  # prefix of the names of the terms' means
WATCHED = 50  # on a GPU the loss is checked in one of so many steps


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
    optimizer: Callable[[Groups], Optimizer] = SGD(),  # noqa: B008 - frozen values
    schedule: Callable[[Optimizer, int, int], LRScheduler] = Constant(),  # noqa: B008
    augment: Callable[[Batch, int], Batch] | None = None,
    average: averaging.Averaging | None = None,
    precision: str = "auto",
    compiled: bool = False,
    sync_batchnorm: bool = False,
    seed: int = 0,
    on_overfitting: str = overfitting.GO_ON,
    checkpoint_share: float = 0.03,
    device: str = "auto",
    fabric: Fabric | None = None,
    run: Store | None = None,
    progress: Progress | None = None,
    rehearsal: bool = True,
) -> list[EpochRecord]:
    """Train ``model`` in place and return the log, one record an epoch.

    Args:
        model: images in [0, 1] -> logits. Submodules in evaluation mode stay in it, unless all are. Modes are restored.
        method: a method, or phases of them ``[(from_epoch, method), ...]``; ramps are resolved at each step.
        split: the training data.
        validation: data that picks the best epoch, attacked by ``check`` (default: a 10-step PGD) within ``threat``.
        epochs, batch_size, seed, on_overfitting: passes over the data, samples a step, seed and rule, as in `Plan`.
        optimizer, schedule: (parameter groups) -> optimizer; (optimizer, total steps, steps an epoch) -> scheduler.
        augment, average: (batch, seed) -> batch; `averaging.EMA` or `averaging.SWA`, whose weights are then kept.
        precision, compiled: of passes, "float32", "bf16" or "auto", the faster; whether ``torch.compile`` makes them.
        sync_batchnorm: let BatchNorm normalise over all processes (on GPUs); else each by itself, statistics averaged.
        checkpoint_share: share of the time in [0, 1] that saving may take; 1 saves each epoch. See `checkpoint.Budget`.
        device, fabric: "auto", "cpu", "cuda", "mps"; or an engine: processes share each batch, the first has the run.
        run: where to log and save. Training resumes from a state saved there, also for more epochs if its past fits.
        progress: called with a `StepRecord` after each step and the `EpochRecord` after each epoch.
        rehearsal: whether to try each phase and the validation on a few samples first; it does not change the result.

    Raises:
        UnmovedError: arguments of other kinds or outside their bounds; a loss that is not finite (it names the step;
            what was saved stays); a ``run`` that is in use, damaged, or was trained with other settings.
    """
    require_model(model, ORDER)
    require_split(split, ORDER)
    held_out = Validation.of(validation, check, threat, ORDER)
    plan = Plan(
        Phases.of(method), split, epochs, batch_size, optimizer, schedule, augment, average, seed, on_overfitting
    )
    require_trained(model)
    engine = distributed.prepare(device) if fabric is None else fabric
    parts = build(model, plan, engine, precision=precision, compiled=compiled, sync_batchnorm=sync_batchnorm)
    if rehearsal:
        _rehearse(parts, plan, held_out)
    return _train(parts, plan, held_out, run, checkpoint_share, progress)


def _rehearse(parts: Parts, plan: Plan, held_out: Validation | None) -> None:
    rehearse_training(
        parts.model,
        plan,
        held_out,
        device=parts.fabric.device,
        count=parts.fabric.world_size,
        precision=parts.precision,
        parameters=parts.parameters,
    )


def _train(
    parts: Parts,
    plan: Plan,
    held_out: Validation | None,
    run: Store | None,
    checkpoint_share: float,
    progress: Progress | None,
) -> list[EpochRecord]:
    """Train epoch by epoch from the state of ``run``; arguments and result as in `train`."""
    if held_out is None and plan.on_overfitting != overfitting.GO_ON:
        raise UnmovedError(
            f"on_overfitting: expected validation data to notice it by, came none with {plan.on_overfitting!r}; pass "
            'validation=, or leave it at "go_on"'
        )
    if run is not None:
        models.require_savable(parts.model.state_dict())
    fabric = parts.fabric
    plan = replace(plan, split=distributed.resident(plan.split, fabric.device))
    averaged = None if plan.average is None else averaging.Average(parts.model, plan.average)
    state = parts.state(plan.phases, averaged, run, checkpoint_share)
    report: Progress = (lambda record: None) if progress is None else progress
    with (
        nullcontext() if run is None else run.alone(),
        torch.random.fork_rng([fabric.device] if fabric.device.type == "cuda" else []),
        weights.in_training(parts.model) as (train_mode, frozen),
    ):
        if frozen and fabric.global_rank == 0:
            text = "in evaluation mode, as they came, stay %s; model.train() before training thaws them"
            logger.info(text, several(frozen))
        _resume(state, parts, plan)
        for epoch in range(state.epochs, plan.epochs):
            if plan.on_overfitting == overfitting.STOP and state.is_stopped:
                break
            train_mode()  # in each epoch, since a callback may have changed the modes
            began = monotonic()
            record = _epoch(parts, plan, state, averaged, epoch, report)
            if held_out is not None:
                with _stopping(epoch, state):
                    record = {**record, **held_out.accuracy(state.kept, plan.batch_size, fabric)}
            reports = {snake_case(type(term).__name__): term.report() for term in parts.terms}
            record["terms"] = {name: facts for name, facts in reports.items() if facts}
            record = state.watch(record, plan.on_overfitting)
            if "overfitting" in record and fabric.global_rank == 0:
                logger.warning("%s", record["overfitting"])
            state.commit(record, monotonic() - began, last=epoch + 1 == plan.epochs or "stopped" in record)
            report(state.log[-1])
    if averaged is not None:
        averaged.give(parts.model)
    return state.log


def _resume(state: TrainerState, parts: Parts, plan: Plan) -> None:
    """Restore all parts, in every process, from the state of the run, if this call can resume from it."""
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
    report: Progress,
) -> EpochRecord:
    """Take the steps of one epoch and return its record, without what validation and terms add to it."""
    fabric, steps, seed, means = parts.fabric, plan.steps_per_epoch, plan.seed_of(epoch), _Means()
    bounds = bounds_of_phases(plan.phases)
    torch.manual_seed(
        seed + fabric.global_rank
    )  # for the model's own randomness, such as dropout, which is not keyed by sample
    for k, batch in enumerate(one_epoch(plan.split, plan.batch_size, seed)):
        batch, share = collectives.Share.of(batch, fabric.global_rank, fabric.world_size)
        batch = replace(batch.to(fabric.device), step=epoch * steps + k)
        batch = batch if plan.augment is None else plan.augment(batch, plan.seed)
        method = plan.phases.at(epoch + k / steps, plan.epochs)
        # On a GPU, checking every loss would mean waiting for every step.
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
            if share is not None:  # listed anew, since a layer may have replaced a buffer by another tensor
                collectives.average([b for b in parts.model.buffers() if b.is_floating_point()])
        values = {"loss": step.loss, "train_accuracy": step.accuracy}
        values |= {_PART + name: value for name, value in step.parts.items()}
        means.add(values, len(batch) if share is None else share.own)
        if averaged is not None:
            averaged.follow(parts.model, batch.step, plan.steps)
        parts.scheduler.step()
        if watch:
            report({"epoch": epoch, "share": (k + 1) / steps, "loss": float(step.loss)})
    with _stopping(epoch, state):
        _require_finite(parts.model, batch.step)
    over_all = means.means(fabric)
    return {
        "epoch": epoch + 1,
        "step": (epoch + 1) * steps,
        "lr": parts.optimizer.param_groups[0]["lr"],
        "eps": _eps(method.attack),
        "loss": over_all["loss"],
        "train_accuracy": over_all["train_accuracy"],
        "parts": {name.removeprefix(_PART): mean for name, mean in over_all.items() if name.startswith(_PART)},
    }


class _Means:
    """Compute means over samples, not over batches: the last batch may be smaller.

    Each mean is over the samples for which its name was given, since a term of weight zero has no value.
    """

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, int] = {}

    def add(self, values: dict[str, Tensor], size: int) -> None:
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0.0) + value.double() * size
            self.counts[name] = self.counts.get(name, 0) + size

    def means(self, fabric: Fabric) -> dict[str, float]:
        """Return the means over the samples of all processes."""
        sums = torch.stack([*self.sums.values()])
        counts = torch.tensor([*self.counts.values()], dtype=torch.float64, device=sums.device)
        sums, counts = distributed.summed(fabric, torch.stack([sums, counts]))
        return dict(zip(self.sums, (sums / counts).tolist(), strict=True))


def _require_finite(model: nn.Module, step: int) -> None:
    """Raise `Diverged` if a weight is not finite; this waits for a GPU once."""
    if not torch.stack([p.detach().isfinite().all() for p in model.parameters()]).all():
        raise Diverged(f"a weight became NaN or infinite by step {step}")


@contextmanager
def _compiling(parts: Parts) -> Iterator[None]:
    """Explain an error of ``torch.compile``, which compiles the model in the first pass."""
    try:
        yield
    except RuntimeError as error:
        is_compilers = type(error).__module__.startswith(("torch._dynamo", "torch._inductor"))
        if parts.attacked is parts.model or not is_compilers:
            raise
        raise UnmovedError(
            f"compiled: torch.compile cannot build this model here ({str(error).splitlines()[0]}); leave "
            "training.compiled out"
        ) from error


@contextmanager
def _stopping(epoch: int, state: TrainerState) -> Iterator[None]:
    """Add the epoch, and what is saved, to the message of an `UnmovedError`."""
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
