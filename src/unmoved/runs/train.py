"""Train a recipe into a run folder, from the start or from where it was interrupted."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Collection
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

from unmoved.core.errors import UnmovedError
from unmoved.core.phases import Ramp
from unmoved.core.precision import resolve
from unmoved.core.protocols import Split
from unmoved.core.threat import ThreatModel
from unmoved.core.untrusted import Json
from unmoved.models import require_checkpoint
from unmoved.runs import recipe as config
from unmoved.runs.assembly import Assembly
from unmoved.runs.folder import Run
from unmoved.runs.trained_elsewhere import is_of_other_weights
from unmoved.terms.sum import stateful
from unmoved.training import distributed, loop
from unmoved.training.checkpoint import NEWEST, PREVIOUS
from unmoved.training.log import Progress
from unmoved.training.plan import Plan
from unmoved.training.rehearsal import rehearse_training, require_trained
from unmoved.training.validation import Validation

if TYPE_CHECKING:
    from lightning_fabric import Fabric

logger = logging.getLogger("unmoved")
MUCH = 0.25  # a training a little beyond the ball that judges is usual


def train_recipe(
    recipe: config.Recipe,
    out: Path | str,
    *,
    resume: bool = False,
    allow: Collection[str] = (),
    device: str = "auto",
    devices: int = 1,
    nodes: int = 1,
    progress: Progress | None = None,
    loading: Callable[[int, int], None] | None = None,
    build: Callable[[], Assembly] | None = None,
) -> Run:
    """Train a recipe into a run folder; with ``resume`` continue from the state in the folder, if there is one.

    With several ``devices`` or ``nodes`` the first process starts the others of its machine by its own command line;
    on other machines that command is started by hand with ``NODE_RANK`` and ``MASTER_ADDR`` set, or on all by
    ``torchrun``. They share each batch and make the step that one process would make; only the first writes the folder.

    ``progress`` is as in `unmoved.train`; ``loading`` is called with (done, total) images while they are decoded.
    ``build`` returns the objects of the recipe, if the caller needs them too.

    Raises:
        UnmovedError: a folder that holds a run (without ``resume``) or a run of another recipe, or in which another
            process is at work; another process that ended; as `train` and `distributed.prepare`.
    """
    first = distributed.rank(devices, nodes) == 0
    with ExitStack() as held:
        if first and Path(out).is_dir():  # otherwise no folder is made before the recipe has been checked
            held.enter_context(Run(out).alone())
        run = _begun(out, recipe.tables()) if first and resume else None
        done = run is not None and _is_done(run, recipe)
        if run is not None and done and nodes == 1 and not distributed.started_by_others():
            return run  # on every machine, or the others would wait for this one
        fabric = distributed.prepare(device, devices, nodes)
        # Mistakes in a recipe are found before a folder is made and before other processes are started.
        weights = recipe.model.weights
        if weights is not None and run is None:
            require_checkpoint(weights.file)  # before images are decoded, which takes a while
        assembly = Assembly(recipe, allow, loading) if build is None else build()
        is_begun = run is not None and any(os.path.lexists(run.path / name) for name in (NEWEST, PREVIOUS))
        # The saved state holds the weights, whose original file may be gone.
        model, loaded = (assembly.model(), None) if is_begun else assembly.initial_model()
        if run is not None and loaded is not None and is_of_other_weights(run.path, loaded.sha256):
            raise UnmovedError(
                f"{run.path} was begun with other weights than [model] weights holds now; choose another --out"
            )
        train_part, validation = assembly.parts()
        _rehearse(model, assembly, train_part, validation, fabric)
        if first:
            _tell_of_another_ball(assembly)
            held.enter_context(Run(out).alone())
            # If the folder was missing, another process may have started there in the meantime.
            run = (_begun(out, recipe.tables()) if resume else None) or Run.create(out, recipe.tables(), weights=loaded)
        with distributed.together(fabric):
            if not distributed.broadcast(fabric, done):
                _train(model, assembly, train_part, validation, fabric, run, progress if first else None)
    return Run(out) if run is None else run


def _train(
    model: nn.Module,
    assembly: Assembly,
    train_part: Split,
    validation: Split | None,
    fabric: Fabric,
    run: Run | None,
    progress: Progress | None,
) -> None:
    """Call `train` with what the recipe says, without a rehearsal."""
    training = assembly.recipe.training
    loop.train(
        model,
        assembly.phases,
        train_part,
        validation=validation,
        check=assembly.check,
        threat=assembly.threat,
        epochs=training.epochs,
        batch_size=training.batch_size,
        optimizer=assembly.optimizer,
        schedule=assembly.schedule,
        augment=assembly.augment,
        average=assembly.average,
        precision=training.precision,
        compiled=training.compiled,
        sync_batchnorm=training.sync_batchnorm,
        seed=training.seed,
        on_overfitting=training.on_overfitting,
        checkpoint_share=training.checkpoint_share,
        fabric=fabric,
        run=run,
        progress=progress,
        rehearsal=False,
    )


def _rehearse(
    model: nn.Module, assembly: Assembly, train_part: Split, validation: Split | None, fabric: Fabric
) -> None:
    """Move the model to the device of this process, and try a step of each phase and the validation there."""
    training = assembly.recipe.training
    fabric.to_device(model)
    for _, method in assembly.phases.phases:
        fabric.to_device(nn.ModuleList(stateful(method.objective)))
    require_trained(model)
    plan = Plan(
        assembly.phases,
        train_part,
        training.epochs,
        training.batch_size,
        assembly.optimizer,
        assembly.schedule,
        assembly.augment,
        assembly.average,
        training.seed,
        training.on_overfitting,
    )
    held_out = Validation.of(validation, assembly.check, assembly.threat)
    precision = resolve(training.precision, fabric.device)
    rehearse_training(model, plan, held_out, device=fabric.device, count=fabric.world_size, precision=precision)


def _tell_of_another_ball(assembly: Assembly) -> None:
    """Log that training ends with attacks of quite another eps than that which judges: a ramp has ends of its own."""
    start, last = assembly.phases.phases[-1]
    ball = getattr(last.attack, "threat", None)
    if not isinstance(ball, ThreatModel):
        return
    eps = ball.eps.stop if isinstance(ball.eps, Ramp) else ball.eps
    if abs(eps - assembly.threat.radius) > MUCH * assembly.threat.radius:
        logger.info(
            "training ends with attacks within eps %g, where the threat model that judges has %g: set eps of [attack], "
            "or of the phase from epoch %d, too",
            *(eps, assembly.threat.radius, start),
        )


def _is_done(run: Run, recipe: config.Recipe) -> bool:
    """Return whether all epochs are saved; if so, restore a log or weights that are missing or damaged."""
    if run.is_done(recipe.training.epochs):
        return True
    saved = run.load_state()
    if saved is None or saved["epochs"] < recipe.training.epochs and "stopped" not in saved["record"]:
        return False
    run.mend_weights(saved)
    run.mend_log(saved)
    return True


def _begun(out: Path | str, tables: Json) -> Run | None:
    """Return the run of this recipe that the folder holds, if it holds one."""
    if not os.path.lexists(Path(out) / "recipe.toml"):
        return None
    run = Run.open(out)
    if keys := config.differing(config.parse(run.recipe, str(run.path / "recipe.toml")), tables):
        raise UnmovedError(
            f"{out} holds a run of another recipe (it differs in: {', '.join(keys)}); choose another --out, "
            f"or pass {Path(out) / 'recipe.toml'} to go on with that one"
        )
    return run
