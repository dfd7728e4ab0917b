"""The one training loop. Methods are values handed to it; everything else is files."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from time import monotonic
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from unmoved import judge, outcomes
from unmoved import precision as formats
from unmoved.attacks import PGD
from unmoved.defenses import Plain
from unmoved.errors import UnmovedError, require_number
from unmoved.optim import SGD, Constant
from unmoved.protocols import Attack, Batch, Method, Split, StatefulAttack
from unmoved.rehearsal import rehearse
from unmoved.run import Run
from unmoved.schedule import Phases
from unmoved.state import Means, TrainerState
from unmoved.terms.sum import as_sum, snake_case, stateful
from unmoved.threat import ThreatModel
from unmoved.views import Views


@dataclass(frozen=True)
class Step:
    """What one optimizer step saw at the uncorrupted weights.

    Attributes:
        loss: the mean objective.
        parts: each term's own mean, unweighted.
        accuracy: share of the batch that was right on the view that was trained on.
    """

    loss: Tensor
    parts: dict[str, Tensor]
    accuracy: Tensor


def train_step(
    model: nn.Module,
    method: Method,
    optimizer: Optimizer,
    batch: Batch,
    precision: str = "auto",
    *,
    attacked: nn.Module | None = None,
    backward: Callable[[Tensor], Any] = Tensor.backward,
) -> Step:
    """One step of a method: make x_adv once, then let the defense take gradient and step.

    Args:
        model: in training mode, its parameters (and those of learned terms) in ``optimizer``.
        method: what to do.
        batch: images, labels, identities; set ``batch.step`` so that each step draws new noise.
        precision: ``"auto"``, ``"float32"`` or ``"bf16"``; parameters stay float32.
        attacked: the bare module where ``model`` is a wrapper.
        backward: what turns a loss into gradients, where an engine has its own.

    Raises:
        UnmovedError: a loss that is not finite; raised before anything is changed.
    """
    objective = as_sum(method.objective)
    x_adv = None
    if method.attack is not None:
        with formats.autocast(precision, batch.x.device):
            x_adv = method.attack(model if attacked is None else attacked, batch)
    first: list[tuple[Views, Step]] = []

    def closure() -> Tensor:
        with formats.autocast(precision, batch.x.device):
            views = Views(model, batch, x_adv)
            parts = objective.parts(views)
            loss = objective.combine(parts).mean()
        means = {name: part.detach().mean() for name, part in parts.items()}
        if not torch.isfinite(loss):
            values = ", ".join(f"{name} = {value:g}" for name, value in means.items())
            raise UnmovedError(f"the loss became {loss.item():g} at step {batch.step} ({values})")
        if not first:
            # A view that the objective did not ask for is not computed: its pass would move BatchNorm's statistics.
            logits = views.adv if views.has("adv") else views.clean
            accuracy = (logits.detach().argmax(dim=1) == batch.y).float().mean()
            first.append((views, Step(loss.detach(), means, accuracy)))
        backward(loss)
        return loss.detach()

    (method.defense or Plain())(model, optimizer, closure)
    views, step = first[0]
    with torch.no_grad():
        for term in stateful(objective):
            term.update(views)
        if isinstance(method.attack, StatefulAttack) and x_adv is not None:
            method.attack.update(model if attacked is None else attacked, batch, x_adv)
    return step


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
    precision: str = "auto",
    seed: int = 0,
    device: str = "auto",
    run: Run | None = None,
    progress: Callable[[dict[str, Any]], None] | None = None,
) -> list[dict[str, Any]]:
    """Train ``model`` in place and return the log, one record an epoch.

    Args:
        model: images in [0, 1] -> logits.
        method: a method, or phases of them ``[(from_epoch, method), ...]``; ramps are resolved at each step.
        split: the training data.
        validation: held-out data that picks the best epoch, attacked by ``check`` within ``threat``; ``check``
            defaults to a 10-step PGD.
        optimizer: parameter groups -> optimizer, such as ``optim.SGD(lr=0.1)``.
        schedule: (optimizer, total steps, steps an epoch) -> scheduler, stepped once per optimizer step.
        augment: (batch, seed) -> batch.
        seed: of shuffling, augmentation and the model's own randomness; the caller's random state is left alone.
        run: where to save after each epoch; if it holds a saved state, training goes on from there.
        progress: called with the latest record after each step (``{"epoch", "share"}``) and epoch; and with
            ``{"note"}``, a sentence, where something damaged was found in ``run`` and mended.

    Raises:
        UnmovedError: a value outside its bounds, a loss that is not finite (naming the step; what was saved stays); a
            ``run`` that another process trains or evaluates, or whose saved states are all damaged.
    """
    from lightning_fabric import Fabric  # seconds to import, and only training needs it

    require_number("epochs", epochs, at_least=1)
    require_number("batch_size", batch_size, at_least=1)
    formats.require_device(device)
    if len(split) == 0:
        raise UnmovedError("train: expected at least one sample, came none")
    if validation is not None and threat is None:
        raise UnmovedError("train: validation needs the threat model to judge by; pass threat=ThreatModel(...)")
    phases = Phases.of(method)
    fabric = Fabric(accelerator="auto" if device == "auto" else device, devices=1)
    precision = formats.resolve(precision, fabric.device)
    learned = _unique(t for _, m in phases.phases for t in stateful(m.objective))
    terms = nn.ModuleList(learned)
    fabric.to_device(terms)
    groups: list[dict[str, Any]] = [{"params": list(model.parameters())}]
    if any(True for _ in terms.parameters()):
        groups.append({"params": list(terms.parameters()), "weight_decay": 0.0})
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # the same numbers, faster convolutions
    per_epoch = -(-len(split) // batch_size)
    opt = optimizer(groups)
    scheduler = schedule(opt, per_epoch * epochs, per_epoch)
    wrapped, wrapped_opt = fabric.setup(model, opt)
    rehearse(model, phases, next(iter(split.batches(2))).to(fabric.device))
    state = TrainerState(model, opt, scheduler, terms, _unique(m.attack for _, m in phases.phases), run)
    with (
        nullcontext() if run is None else run.alone(),
        torch.random.fork_rng([fabric.device] if fabric.device.type == "cuda" else []),
    ):
        state.restore(lambda words: None if progress is None else progress({"note": words}))
        for epoch in range(len(state.log), epochs):
            torch.manual_seed(_mix(seed, epoch))
            model.train()
            began, log = monotonic(), Means()
            for k, batch in enumerate(split.batches(batch_size, shuffle=_mix(seed, epoch))):
                batch = replace(batch.to(fabric.device), step=epoch * per_epoch + k)
                batch = batch if augment is None else augment(batch, seed)
                current = phases.at(epoch + k / per_epoch, epochs)
                try:
                    step = train_step(
                        wrapped, current, wrapped_opt, batch, precision, attacked=model, backward=fabric.backward
                    )
                except UnmovedError as error:
                    raise _stopped(error, epoch, run) from error
                log.add({"loss": step.loss, "train_accuracy": step.accuracy}, step.parts, len(batch))
                scheduler.step()
                if progress is not None:
                    progress({"epoch": epoch, "share": (k + 1) / per_epoch, "loss": float(step.loss)})
            if not all(torch.isfinite(p).all() for p in model.parameters()):
                raise _stopped(UnmovedError(f"a weight became NaN or infinite by step {batch.step}"), epoch, run)
            record = {"epoch": epoch + 1, "step": (epoch + 1) * per_epoch, "lr": opt.param_groups[0]["lr"]}
            record |= {"eps": _eps(current.attack), **log.means()}
            if validation is not None and threat is not None:
                try:
                    record |= _validate(model, validation, check, threat, batch_size)
                except UnmovedError as error:
                    raise _stopped(error, epoch, run, mend="") from error
            reports = {snake_case(type(term).__name__): term.report() for term in learned}
            record |= {"terms": {name: facts for name, facts in reports.items() if facts}}
            state.commit(record, monotonic() - began)
            if progress is not None:
                progress(state.log[-1])
    return state.log


def _stopped(
    error: UnmovedError, epoch: int, run: Run | None, mend: str = "; try a smaller lr or a ramp of eps"
) -> UnmovedError:
    kept = f"; {run.path} keeps the state after epoch {epoch}" if run is not None and epoch else ""
    return UnmovedError(f"{error}, in epoch {epoch + 1}: training stopped{kept}{mend}")


def _validate(
    model: nn.Module, validation: Split, check: Attack | None, threat: ThreatModel, batch_size: int
) -> dict[str, Any]:
    attack = PGD(threat, keep="best") if check is None else check
    table = judge.evaluate(model, validation, {"validation": attack}, threat, batch_size=batch_size)
    accuracy = outcomes.summary(table).set_index("measure")["accuracy"]
    return {
        "validation_clean": float(accuracy["clean"]),
        "validation_robust": float(accuracy["validation"]),
        "validation_n": len(validation),
    }


def _eps(attack: Attack | None) -> float | None:
    threat = getattr(attack, "threat", None)
    return threat.radius if isinstance(threat, ThreatModel) else None


def _unique(items: Any) -> list[Any]:
    return list({id(item): item for item in items if item is not None}.values())


def _mix(seed: int, epoch: int) -> int:
    """One seed per epoch, far apart for neighbouring run seeds."""
    return (seed * 1_000_003 + epoch) % 2**63
