"""The command `unmoved`. Every mistake of a user ends in one message and exit code 1; 2 is a wrong command line."""

from __future__ import annotations

import inspect
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import tomli_w
import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

app = typer.Typer(
    help="Train image classifiers that small worst-case perturbations do not move, and measure how far that is true.",
    epilog="Start with: unmoved compare recipes/digits/standard.toml recipes/digits/at.toml",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
console = Console()

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
    log = _tensorboard(out) if tensorboard else None
    with _bars() as add:
        loading: list[Advance] = []
        advance = add(parsed.name, epochs)

        def read(done: int, total: int) -> None:
            if not loading:
                loading.append(add("reading images", total))
            loading[0](done)

        def progress(record: dict[str, Any]) -> None:
            if "share" in record:
                advance(record["epoch"] + record["share"])
                return
            _say_epoch(record, epochs)
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
    weights: Annotated[str, typer.Option(help="best (by validation robust accuracy) or last.")] = "best",
    batch_size: Annotated[int, typer.Option(min=1, help="Images a pass; the verdict does not depend on it.")] = 256,
    allow: Allow = [],  # noqa: B006
    device: Device = "auto",
) -> None:
    """Attack a trained run and judge it on the test part of its data."""
    from unmoved import errors, judge
    from unmoved import run as runs

    errors.require_choice("--weights", weights, ("best", "last"))
    opened = runs.Run.open(run)
    with _bar("attacking", 1) as advance:
        table = judge.evaluate_run(
            opened,
            n=n,
            weights=weights,
            batch_size=batch_size,
            device=device,
            allow=allow,
            progress=lambda done, total: advance(done / total),
        )
    _print_summary({opened.name: table})
    console.print(f"saved: {run / 'evaluation'}\nnext: unmoved report {run}", soft_wrap=True)


@app.command()
def compare(
    recipes: Annotated[list[Path], typer.Argument(metavar="RECIPE...", help="Recipes to train, judge and compare.")],
    seeds: Annotated[str, typer.Option(help="Seeds, such as 0 or 0,1,2.")] = "0",
    out: Annotated[Path, typer.Option(help="Folder for the runs and the report.")] = Path("runs/compare"),
    workers: Annotated[int | None, typer.Option(min=1, help="Processes at a time; one a core by default.")] = None,
    overrides: Overrides = [],  # noqa: B006
    allow: Allow = [],  # noqa: B006
) -> None:
    """The main job: recipes x seeds -> runs -> one table and one report. Goes on where it was interrupted."""
    import os

    from unmoved import compare as grid
    from unmoved import config, errors
    from unmoved import report as reports

    try:
        numbers = [int(seed) for seed in seeds.split(",")]
    except ValueError:
        raise errors.UnmovedError(f"--seeds: expected whole numbers such as 0,1,2, came {seeds!r}") from None
    parsed = [config.read(path, overrides) for path in recipes]
    count = workers or os.cpu_count() or 1
    threads = max(1, (os.cpu_count() or 1) // min(count, len(parsed) * len(numbers)))
    jobs = grid.jobs_of(parsed, numbers, out, allow, threads)
    with _bar(f"{len(jobs)} runs", sum(job.epochs for job in jobs)) as advance:

        def done(job: grid.Job, error: str | None) -> None:
            console.print(f"failed: {job.label}" if error else f"done: {job.label}")

        runs = grid.compare(jobs, workers=count, on_done=done, poll=lambda: advance(sum(map(_epochs_done, jobs))))
    path = reports.write(runs, out / "report.html", title=f"{len(parsed)} recipes, {len(numbers)} seed(s)")
    _print_summary({f"{run.name} seed {run.seed}" if len(numbers) > 1 else run.name: run.outcomes for run in runs})
    console.print(f"report: {path}", soft_wrap=True)


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


# --- what people see


Advance = Callable[[float], None]


@contextmanager
def _bars() -> Iterator[Callable[[str, float], Advance]]:
    """Progress bars on a terminal, each made with (label, total); nothing where lines are read by a program."""
    if not console.is_terminal:
        yield lambda label, total: lambda done: None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:

        def add(label: str, total: float) -> Advance:
            task = progress.add_task(label, total=total)
            return lambda done: progress.update(task, completed=done)

        yield add


@contextmanager
def _bar(label: str, total: float) -> Iterator[Advance]:
    with _bars() as add:
        yield add(label, total)


def _tensorboard(out: Path) -> Callable[[dict[str, Any]], None]:
    """What writes a record of the log as scalars, one point an epoch.

    Raises:
        UnmovedError: tensorboard is not installed.
    """
    from unmoved.errors import UnmovedError

    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise UnmovedError("--tensorboard needs the extra: pip install 'unmoved[tensorboard]'") from error
    writer = SummaryWriter(str(out / "tensorboard"))

    def log(record: dict[str, Any]) -> None:
        for name, value in (record | {f"parts/{part}": mean for part, mean in record["parts"].items()}).items():
            if isinstance(value, int | float) and not isinstance(value, bool):
                writer.add_scalar(name, value, record["epoch"])
        writer.flush()

    return log


def _say_epoch(record: dict[str, Any], epochs: int) -> None:
    words = f"epoch {record['epoch']}/{epochs}: loss {record['loss']:.4f}"
    if "validation_robust" in record:
        words += f", validation clean {record['validation_clean']:.1%}, robust {record['validation_robust']:.1%}"
    console.print(words + f", {record['seconds']:.0f} s", highlight=False)


def _epochs_done(job: Any) -> int:
    try:
        return len((Path(job.path) / "metrics.jsonl").read_text().splitlines())
    except OSError:
        return 0


def _print_summary(tables: dict[str, Any]) -> None:
    from unmoved import outcomes

    view = Table(title="accuracy in %; under attack it is an upper bound", title_justify="left")
    view.add_column("recipe", no_wrap=True)
    summaries = {name: outcomes.summary(table) for name, table in tables.items() if table is not None}
    measures = list(dict.fromkeys(measure for summary in summaries.values() for measure in summary["measure"]))
    for measure in measures:
        view.add_column(measure, justify="right")
    view.add_column("95 % interval", justify="right", no_wrap=True)
    view.add_column("n", justify="right")
    for name, summary in summaries.items():
        rows = summary.set_index("measure")
        cells = [f"{100 * rows.accuracy[m]:.1f}" if m in rows.index else "" for m in measures]
        worst = rows.loc[outcomes.WORST]
        view.add_row(name, *cells, f"{100 * worst.low:.1f} - {100 * worst.high:.1f}", f"{worst['n']:.0f}")
    (console if console.is_terminal else Console(width=1000)).print(view)  # nothing is cut off in a file


if __name__ == "__main__":
    main()
