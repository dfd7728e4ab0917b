"""Define the commands about one run: train, evaluate, doctor."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from unmoved.cli import screen
from unmoved.cli.options import (
    Allow,
    AskDoctor,
    Attacks,
    BatchSize,
    Device,
    Number,
    Overrides,
    RecipePath,
    RunPath,
    Sample,
    Within,
    app,
)

if TYPE_CHECKING:
    import pandas as pd

    from unmoved.runs.folder import Run
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


Radii = Annotated[
    str | None, typer.Option("--eps", help="Judge in other balls than the recipe's: radii such as 0.1,8/255.")
]
Norm = Annotated[str | None, typer.Option(help="The norm of these balls: linf, l2 or l1; the recipe's unless given.")]


@app.command()
def evaluate(
    run: RunPath,
    n: Number = None,
    attacks: Attacks = "recipe",
    sample: Sample = None,
    within: Within = None,
    eps: Radii = None,
    norm: Norm = None,
    weights: Annotated[str, typer.Option(help="best (by validation robust accuracy) or last.")] = "best",
    batch_size: BatchSize = 128,
    precision: Annotated[
        str, typer.Option(help="Of the search: float32, bf16 or auto. Verdicts are float32.")
    ] = "auto",
    save_adversarial: Annotated[
        bool, typer.Option("--save-adversarial", help="Also keep the images that broke the model.")
    ] = False,
    validation: Annotated[
        bool, typer.Option("--validation", help="Judge the images held out of training instead: to choose settings.")
    ] = False,
    ask_doctor: AskDoctor = True,
    allow: Allow = [],  # noqa: B006
    device: Device = "auto",
) -> None:
    """Attack a trained run and judge it on the test part of its data."""
    from unmoved.core import errors
    from unmoved.runs import evaluate as evaluation
    from unmoved.runs import folder as runs

    errors.require_choice("--weights", weights, ("best", "last"))
    opened = runs.Run.open(run)
    if eps is not None or norm is not None:
        if validation or save_adversarial or precision != "auto" or sample or within:
            others = "--validation, --save-adversarial, --precision, --sample, --within"
            raise errors.UnmovedError(f"--eps, --norm: expected none of {others}")
        _in_balls(opened, norm, eps, attacks, n, weights, batch_size, ask_doctor, allow, device)
        return
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
            sample=sample,
            within=within,
            allow=allow,
            progress=advance,
        )
    for kind, table in tables.items():
        _say_evaluated(opened, kind, table, is_sample=sample is not None or within is not None)
    if validation:
        return  # neither a report nor the doctor reads it
    if ask_doctor:
        _examine(opened, allow, device)
    screen.say(f"next: unmoved report {run}")


def _say_evaluated(run: Run, kind: str, table: pd.DataFrame, is_sample: bool) -> None:
    """Print what an evaluation found, and where it lies; say where a sample that was asked for is all there is."""
    screen.print_summary({run.name: table}, screen.SEARCH if kind == "sampled" else screen.BOUND)
    facts = run.facts(kind)
    screen.print_estimate(facts)
    for note in [] if facts is None else facts.get("notes", []):
        screen.say(f"note: {note}")
    if kind == "verdict" and is_sample:
        screen.say(screen.COMPLETE)
    screen.say(f"saved: {run.path / kind}")


def _examine(run: Run, allow: list[str], device: str) -> None:
    """Ask the doctor, and print its sentence."""
    from unmoved.runs import evaluate as evaluation

    with screen.follow() as advance:
        answer = evaluation.examine_run(run, allow=allow, device=device, progress=advance)
    screen.say(f"doctor: {answer['sentence'] or 'no objection'}")


def _in_balls(
    run: Run,
    norm: str | None,
    eps: str | None,
    attacks: str,
    n: int | None,
    weights: str,
    batch_size: int,
    ask_doctor: bool,
    allow: list[str],
    device: str,
) -> None:
    """Judge a run in other balls than its recipe's, each in a folder of its own, and print one table."""
    from unmoved import any_model
    from unmoved.runs import recipe as config

    ball = config.parse(run.recipe, str(run.path / "recipe.toml")).threat
    radii = [ball.eps] if eps is None else [any_model.parsed_eps(text) for text in eps.split(",")]
    judgements = []
    for radius in radii:
        with screen.follow() as progress:
            judgements.append(
                any_model.judge_in_ball(
                    run,
                    norm or ball.norm,
                    radius,
                    attacks=attacks,
                    n=n,
                    weights=weights,
                    doctor=ask_doctor,
                    batch_size=batch_size,
                    allow=allow,
                    device=device,
                    progress=progress,
                )
            )
    screen.print_summary({judgement.run.name: judgement.outcomes for judgement in judgements})
    for judgement in judgements:
        if judgement.doctor is not None:
            screen.say(f"doctor, {judgement.run.name}: {judgement.doctor['sentence'] or 'no objection'}")
        screen.say(f"saved: {judgement.run.path}")


@app.command()
def doctor(
    run: RunPath,
    n: Annotated[int, typer.Option("--n", min=1, help="Test images to look at.")] = 100,
    allow: Allow = [],  # noqa: B006
    device: Device = "auto",
) -> None:
    """Say whether a verdict is to be believed. Looks for masked gradients and attacks that failed."""
    from unmoved.runs import evaluate as evaluation
    from unmoved.runs import folder as runs

    with screen.follow() as advance:
        answer = evaluation.examine_run(runs.Run.open(run), n=n, allow=allow, device=device, progress=advance)
    screen.print_findings(answer)
    screen.say(f"saved: {run / 'doctor.json'}")
