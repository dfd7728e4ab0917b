"""Define the commands about one run: train, evaluate, doctor."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from unmoved.cli import screen
from unmoved.cli.options import Allow, Device, Overrides, RecipePath, RunPath, app

if TYPE_CHECKING:
    from unmoved.training.log import EpochRecord, StepRecord


@app.command()
def train(
    recipe: RecipePath,
    out: Annotated[Path, typer.Option("--out", help="The run folder to make.")],
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on where the folder stands; start if it is empty, end if it is done.")
    ] = False,
    overrides: Overrides = [],  # noqa: B006 - typer's way to say 'none'
    allow: Allow = [],  # noqa: B006
    device: Device = "auto",
    devices: Annotated[
        int, typer.Option(min=1, help="Processes on this machine that share each batch: one a GPU, or parts of a CPU.")
    ] = 1,
    nodes: Annotated[
        int, typer.Option(min=1, help="Machines; start this on each, with NODE_RANK, MASTER_ADDR and MASTER_PORT set.")
    ] = 1,
    tensorboard: Annotated[bool, typer.Option("--tensorboard", help="Also log to RUN/tensorboard.")] = False,
) -> None:
    """Train one recipe into a run folder."""
    from unmoved.core import messages
    from unmoved.runs import recipe as config
    from unmoved.runs import train as training
    from unmoved.training import distributed

    parsed = config.read(recipe, overrides)
    first = distributed.rank(devices, nodes) == 0
    screen.console.quiet = not first  # the others would say the same
    epochs = parsed.training.epochs
    log = screen.tensorboard_log(out) if tensorboard and first else None
    with messages.shown(screen.say), screen.bars() as add:
        loading: list[screen.Advance] = []
        advance = add(parsed.name, epochs)

        def read(done: int, total: int) -> None:
            if not loading:
                loading.append(add("reading images", total))
            loading[0](done)

        def progress(record: StepRecord | EpochRecord) -> None:
            if "share" in record:
                advance(record["epoch"] + record["share"])
                return
            screen.say_epoch(record, epochs)
            if log is not None:
                log(record)

        run = training.train_recipe(
            parsed,
            out,
            resume=resume,
            allow=allow,
            device=device,
            devices=devices,
            nodes=nodes,
            progress=progress,
            loading=read,
        )
    screen.say(f"trained: {run.path}\nnext: unmoved evaluate {run.path}")


@app.command()
def evaluate(
    run: RunPath,
    n: Annotated[int | None, typer.Option("--n", min=1, help="Images to judge; all unless the recipe says.")] = None,
    attacks: Annotated[
        str, typer.Option(help="recipe, quick, standard or rand (AutoAttack), or attacks by name; commas between.")
    ] = "recipe",
    weights: Annotated[str, typer.Option(help="best (by validation robust accuracy) or last.")] = "best",
    batch_size: Annotated[int, typer.Option(min=1, help="Images a pass; the verdict does not depend on it.")] = 128,
    precision: Annotated[
        str, typer.Option(help="Of the search: float32, bf16 or auto. Verdicts are float32.")
    ] = "auto",
    save_adversarial: Annotated[
        bool, typer.Option("--save-adversarial", help="Also keep the images that broke the model.")
    ] = False,
    validation: Annotated[
        bool, typer.Option("--validation", help="Judge the images held out of training instead: to choose settings.")
    ] = False,
    ask_doctor: Annotated[
        bool, typer.Option("--doctor/--no-doctor", help="Ask the doctor too whether to believe it.")
    ] = True,
    allow: Allow = [],  # noqa: B006
    device: Device = "auto",
) -> None:
    """Attack a trained run and judge it on the test part of its data."""
    from unmoved.core import errors
    from unmoved.runs import evaluate as evaluation
    from unmoved.runs import folder as runs

    errors.require_choice("--weights", weights, ("best", "last"))
    opened = runs.Run.open(run)
    with screen.follow() as advance:
        tables = evaluation.evaluate_run(
            opened,
            attacks=attacks,
            n=n,
            weights=weights,
            batch_size=batch_size,
            precision=precision,
            device=device,
            save_adversarial=save_adversarial,
            validation=validation,
            allow=allow,
            progress=advance,
        )
    for kind, table in tables.items():
        screen.print_summary({opened.name: table})
        facts = opened.facts(kind)
        for note in [] if facts is None else facts.get("notes", []):
            screen.say(f"note: {note}")
        screen.say(f"saved: {run / kind}")
    if validation:
        return  # neither a report nor the doctor reads it
    if ask_doctor:
        with screen.follow() as advance:
            answer = evaluation.examine_run(opened, allow=allow, device=device, progress=advance)
        screen.say(f"doctor: {answer['sentence'] or 'no objection'}")
    screen.say(f"next: unmoved report {run}")


@app.command()
def doctor(
    run: RunPath,
    n: Annotated[int, typer.Option("--n", min=1, help="Test images to look at.")] = 100,
    allow: Allow = [],  # noqa: B006
    device: Device = "auto",
) -> None:
    """Is the verdict on an evaluated run to be believed? Signs of masked gradients and of attacks that failed."""
    from unmoved.runs import evaluate as evaluation
    from unmoved.runs import folder as runs

    with screen.follow() as advance:
        answer = evaluation.examine_run(runs.Run.open(run), n=n, allow=allow, device=device, progress=advance)
    screen.print_findings(answer)
    screen.say(f"saved: {run / 'doctor.json'}")
