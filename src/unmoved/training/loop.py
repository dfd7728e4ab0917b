"""The one training loop. Methods are values handed to it; everything else is files."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from time import monotonic
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from unmoved import models
from unmoved.attacks import PGD
from unmoved.core import collectives, weights
from unmoved.core import precision as formats
from unmoved.core.batch import Batch
from unmoved.core.errors import UnmovedError, require_seed, require_whole, several
from unmoved.core.passes import one_epoch, one_pass
from unmoved.core.phases import Phases
from unmoved.core.preconditions import require_callable, require_model, require_split
from unmoved.core.protocols import Attack, Method, Split
from unmoved.core.threat import ThreatModel, require_threat
from unmoved.evaluation import judge, outcomes
from unmoved.terms.sum import snake_case, stateful
from unmoved.training import averaging, distributed, resuming
from unmoved.training.optim import SGD, Constant
from unmoved.training.rehearsal import (
    bounds_of_phases,
    rehearse_training,
    require_optimizer,
    require_steps,
    require_trained,
)
from unmoved.training.state import Means, TrainerState
from unmoved.training.step import Diverged, train_step
from unmoved.training.store import Store

if TYPE_CHECKING:
    from lightning_fabric import Fabric

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
            trained in about (seconds of a save) / share. 1 saves every epoch; the last one is always saved.
        run: where to log and save; if it holds a saved state, training goes on from there. What terms report by class
            is then in ``run.per_class`` too. More epochs are trained where those that are trained already would have
            been the same.
        progress: called with the latest record after each step (``{"epoch", "share"}``) and epoch; and with
            ``{"note"}``, a sentence, where something damaged was found in ``run`` and mended, or where submodules stay
            in evaluation mode.
        rehearsal: whether to try a step of each phase first, on as few samples as an epoch's last batch has, and the
            validation on two: what they refuse is then refused before anything is trained. Nothing changes by it.

    Raises:
        UnmovedError: nothing to train, or arguments of other kinds; a value outside its bounds; a loss
            that is not finite (naming the step; what was saved stays); a ``run`` that another process trains or
            evaluates, that was trained with other settings, or whose saved states are all damaged.
    """
    epochs = require_whole("epochs", epochs, at_least=1)
    batch_size, seed = require_whole("batch_size", batch_size, at_least=1), require_seed("seed", seed)
    formats.require_device(device)
    require_model(model, ORDER)
    require_split(split, ORDER)
    if validation is not None:
        require_split(validation, ORDER)
        if threat is None:
            raise UnmovedError("train: validation needs the threat model to judge by; pass threat=ThreatModel(...)")
        check = PGD(threat, keep="best") if check is None else check
    phases = Phases.of(method)
    for name, value, arguments in (
        ("optimizer", optimizer, "groups"),
        ("schedule", schedule, "optimizer, total, per_epoch"),
        ("augment", augment, "batch, seed"),
        ("average", average, "step, total"),
        ("check", check, "model, batch"),
    ):
        if value is not None or name in ("optimizer", "schedule"):
            require_callable(name, value, arguments)
    if threat is not None:
        require_threat("threat", threat)
    require_trained(model)
    bounds = bounds_of_phases(phases)
    fabric = distributed.prepare(device) if fabric is None else fabric
    rank, count = fabric.global_rank, fabric.world_size
    if count > 1:
        distributed.require_lockstep(phases, sync_batchnorm)
    precision = formats.resolve(precision, fabric.device)
    learned = _unique(t for _, m in phases.phases for t in stateful(m.objective))
    terms = nn.ModuleList(learned)
    fabric.to_device(terms)
    if sync_batchnorm:
        model = distributed.synchronized(model, fabric)
    groups: list[dict[str, Any]] = [{"params": list(model.parameters())}]
    if any(True for _ in terms.parameters()):
        groups.append({"params": list(terms.parameters()), "weight_decay": 0.0})
    form = formats.layout(model, fabric.device, next(one_pass(split, 2)).x)
    model.to(memory_format=form)  # type: ignore[call-overload]  # the same numbers
    per_epoch = -(-len(split) // batch_size)
    opt = optimizer(groups)
    require_optimizer(opt)
    require_trained(model, opt)
    settings = resuming.settings_of(opt, epochs=epochs, batch_size=batch_size, samples=len(split))
    scheduler = schedule(opt, per_epoch * epochs, per_epoch)
    require_steps(scheduler, average, per_epoch * epochs)
    settings["schedule"] = resuming.name_of(scheduler)
    attacked: Any = torch.compile(model) if compiled else model
    with weights.constant_beside(opt, model):  # several processes wait for the gradients that are asked for here
        wrapped, wrapped_opt = fabric.setup(attacked, opt)
    if run is not None:
        models.require_savable(model.state_dict())
    if rehearsal:
        rehearse_training(
            model,
            phases,
            split,
            batch_size,
            device=fabric.device,
            count=count,
            validation=validation,
            check=check,
            threat=threat,
            parameters=[p for group in opt.param_groups for p in group["params"]],
            precision=precision,
            augment=augment,
            seed=seed,
        )
    split = distributed.resident(split, fabric.device)
    averaged = None if average is None else averaging.Average(model, average)
    attacks = _unique(m.attack for _, m in phases.phases)
    average_model = None if averaged is None else averaged.model
    state = TrainerState(model, opt, scheduler, terms, attacks, run, average_model, checkpoint_share, settings)

    def backward(loss: Tensor) -> None:
        fabric.backward(loss)
        collectives.average([p.grad for p in terms.parameters() if p.grad is not None])  # DDP knows the model alone

    def tell(words: str) -> None:
        if progress is not None:
            progress({"note": words})

    with (
        nullcontext() if run is None else run.alone(),
        torch.random.fork_rng([fabric.device] if fabric.device.type == "cuda" else []),
        weights.in_training(model) as (train_mode, frozen),
    ):
        if frozen:
            tell(f"in evaluation mode, as they came, stay {several(frozen)}; model.train() before training thaws them")
        saved = distributed.told(fabric, state.saved(tell))
        if saved is not None:
            saved = resuming.followed(
                saved,
                settings,
                optimizer=opt,
                scheduler=scheduler,
                steps=per_epoch,
                phases=phases,
                average=average,
                where="the run" if run is None else str(run.path),
            )
        state.restore(saved, tell)
        for epoch in range(state.epochs, epochs):
            torch.manual_seed(_mix(seed, epoch) + rank)  # what a model draws, such as dropout, is not keyed by sample
            train_mode()  # again in each epoch: a callback may have left another
            began, log = monotonic(), Means()
            for k, batch in enumerate(one_epoch(split, batch_size, _mix(seed, epoch))):
                batch, share = collectives.Share.of(batch, rank, count)
                batch = replace(batch.to(fabric.device), step=epoch * per_epoch + k)
                batch = batch if augment is None else augment(batch, seed)
                current = phases.at(epoch + k / per_epoch, epochs)
                # On a GPU, to look at every loss would be to wait for every step.
                watch = fabric.device.type == "cpu" or k % WATCHED == 0
                with collectives.sharing(share):
                    try:
                        step = train_step(
                            wrapped,
                            current,
                            wrapped_opt,
                            batch,
                            precision,
                            attacked=attacked,
                            backward=backward,
                            watch=watch,
                            bounds=bounds,
                        )
                    except UnmovedError as error:
                        raise _stopped(error, epoch, state) from error
                    except RuntimeError as error:
                        if not compiled or not type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
                            raise
                        words = f"compiled: torch.compile cannot build this model here ({str(error).splitlines()[0]})"
                        raise UnmovedError(f"{words}; leave training.compiled out") from error
                    if share is not None:  # asked anew: a layer may have put another tensor in a buffer's place
                        collectives.average([b for b in model.buffers() if b.is_floating_point()])
                losses = {"loss": step.loss, "train_accuracy": step.accuracy}
                log.add(losses, step.parts, len(batch) if share is None else share.own)
                if averaged is not None:
                    averaged.follow(model, batch.step, per_epoch * epochs)
                scheduler.step()
                if progress is not None and watch:
                    progress({"epoch": epoch, "share": (k + 1) / per_epoch, "loss": float(step.loss)})
            if not torch.stack([p.detach().isfinite().all() for p in model.parameters()]).all():  # one look at a device
                raise _stopped(Diverged(f"a weight became NaN or infinite by step {batch.step}"), epoch, state)
            record = {"epoch": epoch + 1, "step": (epoch + 1) * per_epoch, "lr": opt.param_groups[0]["lr"]}
            record |= {
                "eps": _eps(current.attack),
                **log.means(partial(distributed.summed, fabric)),
            }
            if validation is not None and check is not None and threat is not None:
                try:
                    record |= _validate(state.kept, validation, check, threat, batch_size, fabric)
                except UnmovedError as error:
                    raise _stopped(error, epoch, state) from error
            reports = {snake_case(type(term).__name__): term.report() for term in learned}
            record |= {"terms": {name: facts for name, facts in reports.items() if facts}}
            state.commit(record, monotonic() - began, last=epoch + 1 == epochs)
            if progress is not None:
                progress(state.log[-1])
    if averaged is not None:
        averaged.give(model)
    return state.log


def _stopped(error: UnmovedError, epoch: int, state: TrainerState) -> UnmovedError:
    mend = "; try a smaller lr or a ramp of eps" if isinstance(error, Diverged) else ""
    kept = f"; {state.run.path} keeps the state after epoch {state.saved_epochs}" if state.run is not None else ""
    return UnmovedError(f"{error}, in epoch {epoch + 1}: training stopped{kept if state.saved_epochs else ''}{mend}")


def _validate(
    model: nn.Module, validation: Split, check: Attack, threat: ThreatModel, batch_size: int, fabric: Fabric
) -> dict[str, Any]:
    """Accuracy clean and attacked; where a split can be selected from, each process takes its part of the samples."""
    n, count, select = len(validation), fabric.world_size, getattr(validation, "select", None)
    divided = select is not None and 1 < count <= n
    part = select(torch.arange(fabric.global_rank, n, count)) if select is not None and divided else validation
    table = judge.evaluate(model, part, {"validation": check}, threat, batch_size=batch_size)
    accuracy = outcomes.summary(table).set_index("measure")["accuracy"]
    right = torch.tensor([accuracy["clean"], accuracy["validation"]], dtype=torch.float64).mul(len(part)).round()
    if divided:
        right = distributed.summed(fabric, right.to(fabric.device))
    clean, robust = (right / n).tolist()
    return {"validation_clean": clean, "validation_robust": robust, "validation_n": n}


def _eps(attack: Attack | None) -> float | None:
    threat = getattr(attack, "threat", None)
    return threat.radius if isinstance(threat, ThreatModel) else None


def _unique(items: Any) -> list[Any]:
    return list({id(item): item for item in items if item is not None}.values())


def _mix(seed: int, epoch: int) -> int:
    """One seed per epoch, far apart for neighbouring run seeds."""
    return (seed * 1_000_003 + epoch) % 2**63
