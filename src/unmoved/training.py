"""From a recipe to a trained run folder, begun anew or gone on with."""

from __future__ import annotations

from collections.abc import Callable, Collection
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from unmoved import config, loop
from unmoved import precision as formats
from unmoved.built import Built
from unmoved.errors import UnmovedError
from unmoved.rehearsal import rehearse
from unmoved.run import Run


def train_recipe(
    recipe: config.Recipe,
    out: Path | str,
    *,
    resume: bool = False,
    allow: Collection[str] = (),
    device: str = "auto",
    progress: Callable[[dict[str, Any]], None] | None = None,
    loading: Callable[[int, int], None] | None = None,
) -> Run:
    """Train a recipe into a run folder; with ``resume`` go on where the folder stands, or start it.

    ``progress`` is that of `unmoved.train`; ``loading`` is called with (done, total) images where decoding takes
    a while.

    Raises:
        UnmovedError: a folder that holds a run (without ``resume``) or a run of another recipe, or in which another
            process is at work; as `train`.
    """
    with ExitStack() as held:
        if Path(out).is_dir():  # otherwise none is made before the recipe is known to be sound
            held.enter_context(Run(out).alone())
        tables = recipe.tables()
        run = _begun(out, tables) if resume else None
        saved = run.load_state() if run is not None else None
        if run is not None and saved is not None and len(saved["log"]) >= recipe.training.epochs:
            run.mend_weights(saved, lambda words: None if progress is None else progress({"note": words}))
            return run
        # Everything a recipe can get wrong is found before a folder is made.
        formats.require_device(device)
        built = Built(recipe, allow, loading)
        model = built.model()
        share = recipe.training.validation
        part = built.data.train
        train_part, validation = part.hold_out(share if share < 1 else int(share), seed=0) if share else (part, None)
        rehearse(model, built.phases, next(iter(train_part.batches(2))))
        held.enter_context(Run(out).alone())
        # Where the folder was missing, another process may have begun in the meantime.
        run = (_begun(out, tables) if resume else None) or Run.create(out, tables)
        loop.train(
            model,
            built.phases,
            train_part,
            validation=validation,
            check=built.check,
            threat=built.threat,
            epochs=recipe.training.epochs,
            batch_size=recipe.training.batch_size,
            optimizer=built.optimizer,
            schedule=built.schedule,
            augment=built.augment,
            precision=recipe.training.precision,
            seed=recipe.training.seed,
            device=device,
            run=run,
            progress=progress,
        )
    return run


def _begun(out: Path | str, tables: dict[str, Any]) -> Run | None:
    """The run of this recipe that the folder holds, if it holds one."""
    if not (Path(out) / "recipe.toml").exists():
        return None
    run = Run.open(out)
    if run.recipe != tables:
        keys = sorted(key for key in {*tables, *run.recipe} if tables.get(key) != run.recipe.get(key))
        raise UnmovedError(
            f"{out} holds a run of another recipe (it differs in: {', '.join(keys)}); choose another --out, "
            f"or pass {Path(out) / 'recipe.toml'} to go on with that one"
        )
    return run
