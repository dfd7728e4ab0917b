"""The command `unmoved`. Every mistake of a user ends in one message and exit code 1; 2 is a wrong command line."""

from __future__ import annotations

import inspect
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import tomli_w
import typer
from rich.console import Console

from unmoved import screen
from unmoved.screen import console

app = typer.Typer(
    help="Train image classifiers that small worst-case perturbations do not move, and measure how far that is true.",
    epilog="Start with: unmoved compare recipes/digits/standard.toml recipes/digits/at.toml",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
RecipePath = Annotated[Path, typer.Argument(metavar="RECIPE", help="A recipe, such as recipes/digits/at.toml.")]
RunPath = Annotated[Path, typer.Argument(metavar="RUN", help="A run folder made by 'unmoved train'.")]
Overrides = Annotated[
    list[str],
    typer.Option("--set", metavar="A.B=VALUE", help="Change a key of the recipe, such as training.epochs=5. Repeats."),
]
Allow = Annotated[
    list[str],
    typer.Option("--allow", metavar="PACKAGE", help="Let recipes import this package of yours. Repeats."),
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or mps.")]


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
    tensorboard: Annotated[bool, typer.Option("--tensorboard", help="Also log to RUN/tensorboard.")] = False,
) -> None:
    """Train one recipe into a run folder."""
    from unmoved import config, loop

    parsed = config.read(recipe, overrides)
    epochs = parsed.training.epochs
    log = screen.tensorboard_log(out) if tensorboard else None
    with screen.bars() as add:
        loading: list[screen.Advance] = []
        advance = add(parsed.name, epochs)

        def read(done: int, total: int) -> None:
            if not loading:
                loading.append(add("reading images", total))
            loading[0](done)

        def progress(record: dict[str, Any]) -> None:
            if "share" in record:
                advance(record["epoch"] + record["share"])
                return
            screen.say_epoch(record, epochs)
            if log is not None:
                log(record)

        run = loop.train_recipe(
            parsed,
            out,
            resume=resume,
            allow=allow,
            device=device,
            progress=progress,
            loading=read,
        )
    console.print(f"trained: {run.path}\nnext: unmoved evaluate {run.path}", soft_wrap=True)


@app.command()
def evaluate(
    run: RunPath,
    n: Annotated[
        int | None, typer.Option("--n", min=1, help="Test images to judge; all unless the recipe says.")
    ] = None,
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
    ask_doctor: Annotated[
        bool, typer.Option("--doctor/--no-doctor", help="Ask the doctor too whether to believe it.")
    ] = True,
    allow: Allow = [],  # noqa: B006
    device: Device = "auto",
) -> None:
    """Attack a trained run and judge it on the test part of its data."""
    from unmoved import errors, evaluation
    from unmoved import run as runs

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
            allow=allow,
            progress=advance,
        )
    for kind, table in tables.items():
        screen.print_summary({opened.name: table})
        for note in (getattr(opened, kind) or {}).get("notes", []):
            console.print(f"note: {note}", soft_wrap=True)
        console.print(f"saved: {run / kind}", soft_wrap=True)
    if ask_doctor:
        with screen.follow() as advance:
            answer = evaluation.examine_run(opened, allow=allow, device=device, progress=advance)
        console.print(f"doctor: {answer['sentence'] or 'no objection'}", highlight=False, soft_wrap=True)
    console.print(f"next: unmoved report {run}", soft_wrap=True)


@app.command()
def doctor(
    run: RunPath,
    n: Annotated[int, typer.Option("--n", min=1, help="Test images to look at.")] = 100,
    allow: Allow = [],  # noqa: B006
    device: Device = "auto",
) -> None:
    """Is the verdict on an evaluated run to be believed? Signs of masked gradients and of attacks that failed."""
    from unmoved import evaluation
    from unmoved import run as runs

    with screen.follow() as advance:
        answer = evaluation.examine_run(runs.Run.open(run), n=n, allow=allow, device=device, progress=advance)
    screen.print_findings(answer)
    console.print(f"saved: {run / 'doctor.json'}", soft_wrap=True)


@app.command()
def compare(
    recipes: Annotated[list[Path], typer.Argument(metavar="RECIPE...", help="Recipes to train, judge and compare.")],
    seeds: Annotated[str, typer.Option(help="Seeds, such as 0 or 0,1,2.")] = "0",
    out: Annotated[Path, typer.Option(help="Folder for the runs and the report.")] = Path("runs/compare"),
    workers: Annotated[int | None, typer.Option(min=1, help="Processes at a time; one a core by default.")] = None,
    attacks: Annotated[str, typer.Option(help="What judges every run; as in 'unmoved evaluate'.")] = "recipe",
    finalists: Annotated[int, typer.Option(min=0, help="AutoAttack standard judges this many of the best runs.")] = 0,
    final_n: Annotated[int | None, typer.Option(min=1, help="... on this many test images; all by default.")] = None,
    sweep: Annotated[
        list[str],
        typer.Option("--sweep", metavar="A.B=V1,V2,...", help="Each recipe at each value. Repeats: all combinations."),
    ] = [],  # noqa: B006
    splits: Annotated[
        int, typer.Option(help="Train on each of this many disjoint parts of the data, for 'analyze bias-variance'.")
    ] = 0,
    permutations: Annotated[int, typer.Option(help="... after each of this many permutations of it.")] = 1,
    overrides: Overrides = [],  # noqa: B006
    allow: Allow = [],  # noqa: B006
) -> None:
    """The main job: recipes x seeds -> runs -> one table and one report. Goes on where it was interrupted."""
    import os

    from unmoved import compare as grid
    from unmoved import errors
    from unmoved import jobs as plans
    from unmoved import report as reports

    try:
        numbers = [int(seed) for seed in seeds.split(",")]
    except ValueError:
        raise errors.UnmovedError(f"--seeds: expected whole numbers such as 0,1,2, came {seeds!r}") from None
    parsed = plans.read(recipes, overrides, sweep)
    count = workers or os.cpu_count() or 1
    runs_each = splits * permutations if splits else len(numbers)
    threads = max(1, (os.cpu_count() or 1) // min(count, len(parsed) * runs_each))
    runs_words = f"{splits} parts, {permutations} permutation(s)" if splits else _count(numbers, "seed")
    jobs = plans.jobs_of(parsed, numbers, out, allow, threads, attacks, splits=splits, permutations=permutations)
    with screen.bars() as add:
        advance = add(f"{len(jobs)} runs", sum(job.epochs for job in jobs))

        def done(job: plans.Job, error: str | None) -> None:
            console.print(f"failed: {job.label}" if error else f"done: {job.label}")

        runs = grid.compare(jobs, workers=count, on_done=done, poll=lambda: advance(sum(map(screen.epochs_done, jobs))))
    if finalists:
        with screen.follow() as follow:
            best = grid.finals(runs, finalists, final_n, allow=allow, progress=follow)
        screen.print_summary({run.name: run.verdict_outcomes for run in best})
    path = reports.write(runs, out / "report.html", title=f"{_count(parsed, 'recipe')}, {runs_words}")
    screen.print_summary({f"{run.name} seed {run.seed}" if runs_each > 1 else run.name: run.outcomes for run in runs})
    console.print(f"report: {path}", soft_wrap=True)


def _count(things: Sequence[object], name: str) -> str:
    return f"{len(things)} {name}{'s' if len(things) != 1 else ''}"


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Evaluated run folders.")],
    out: Annotated[Path, typer.Option(help="The HTML file to write.")] = Path("report.html"),
    title: Annotated[str, typer.Option(help="Its heading.")] = "Robustness report",
) -> None:
    """Draw one self-contained HTML report of evaluated runs."""
    from unmoved import report as reports
    from unmoved import run as folders

    path = reports.write([folders.Run.open(run) for run in runs], out, title=title)
    console.print(f"report: {path}", soft_wrap=True)


@app.command()
def show(
    recipe: Annotated[Path | None, typer.Argument(metavar="[RECIPE]", help="The recipe to resolve.")] = None,
    overrides: Overrides = [],  # noqa: B006
    schema: Annotated[bool, typer.Option("--schema", help="Print the JSON schema of recipes instead.")] = False,
) -> None:
    """Print a recipe fully resolved, as TOML that can be trained; or the JSON schema that editors complete from."""
    from unmoved import config, errors

    if schema:
        sys.stdout.write(json.dumps(config.Recipe.model_json_schema(), indent=2) + "\n")
    elif recipe is None:
        raise errors.UnmovedError("show: expected a recipe file or --schema, came neither")
    else:
        sys.stdout.write(tomli_w.dumps(config.read(recipe, overrides).tables()))


@app.command("list")
def list_() -> None:
    """Everything a recipe can name: terms, attacks, defenses, models, data; and the recipes in this folder."""
    from unmoved import components

    for kind, members in components.KINDS.items():
        console.print(f"[bold]{kind}[/bold]")
        for name, factory in sorted(members.items()):
            summary = (inspect.getdoc(factory) or "").split("\n")[0]
            console.print(f"  {name:24} {summary}", markup=False, highlight=False, soft_wrap=True)
    console.print("[bold]recipes[/bold]")
    for path in sorted(Path("recipes").glob("*/*.toml")):
        first = path.read_text().split("\n", 1)[0].removeprefix("#").strip()
        console.print(f"  {path!s:40} {first}", markup=False, highlight=False, soft_wrap=True)


def main() -> None:
    """The entry point: errors that a user can cause become one message on standard error and exit code 1."""
    from unmoved.errors import UnmovedError

    said = Console(stderr=True)
    try:
        app()
    except (UnmovedError, OSError) as error:
        words = f"{error.filename}: {error.strerror}" if isinstance(error, OSError) and error.filename else error
        said.print(f"error: {words}", style="red", markup=False, highlight=False, soft_wrap=True)
        sys.exit(1)
    except SystemExit as end:
        if end.code == 130:  # typer's answer to Ctrl-C, which says nothing
            said.print("interrupted; what was saved is intact, --resume goes on from there", soft_wrap=True)
        raise


if __name__ == "__main__":
    main()
