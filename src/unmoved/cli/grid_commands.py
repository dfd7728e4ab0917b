"""Define the commands about several runs: compare, report, and where analyze starts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from unmoved.cli import screen
from unmoved.cli.grid_watch import GridWatch
from unmoved.cli.options import Allow, Overrides, RecipePaths, app

if TYPE_CHECKING:
    from unmoved.experiments.jobs import Job
    from unmoved.experiments.ray_cluster import Cluster
    from unmoved.reports.pages import Section
    from unmoved.runs.folder import Run


Out = Annotated[Path, typer.Option(help="Folder for the runs and the report.")]
Workers = Annotated[
    int | None, typer.Option(min=1, help="Processes at a time; one a core by default, or all that a cluster holds.")
]
# The long ones first, so that no core waits for another at the end.
DEMO = ("at_apd", "trades_awp", "probscut_trades", "at_sam", "mart", "trades", "at", "sensible", "drsl", "standard")


@app.command()
def demo(out: Out = Path("runs/demo"), workers: Workers = None) -> None:
    """Compare ten methods on scikit-learn's digits.

    A first report, without a download; 2 to 5 minutes on two cores. Goes on where it was interrupted.
    """
    compare(
        [Path("digits", name) for name in DEMO],
        out=out,
        workers=workers,
        attacks="quick",
        finalists=2,
        final_n=100,
        analyze="softmax,corruption",
        analysis_n=32,
    )


@app.command()
def compare(
    recipes: RecipePaths,
    seeds: Annotated[str, typer.Option(help="Seeds, such as 0 or 0,1,2.")] = "0",
    out: Out = Path("runs/compare"),
    workers: Workers = None,
    on: Annotated[str, typer.Option(help="local, or ray: a Ray cluster that shares OUT (unmoved[ray]).")] = "local",
    ray_address: Annotated[
        str | None, typer.Option(metavar="HOST:PORT", help="... this one; a running one by default, or a local one.")
    ] = None,
    cpus_per_run: Annotated[
        int | None, typer.Option(min=1, help="... with this many cores (and threads) a run; 1 by default.")
    ] = None,
    gpus_per_run: Annotated[
        float | None, typer.Option(min=0, help="... and this many GPUs, or a share of one; none by default.")
    ] = None,
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
    analyze: Annotated[
        str,
        typer.Option("--analyze", help="Chapters for the report, such as softmax,tradeoff: any WHAT of 'analyze'."),
    ] = "",
    analysis_n: Annotated[int, typer.Option(min=1, help="Test images that the analyses look at.")] = 1000,
    overrides: Overrides = [],  # noqa: B006
    allow: Allow = [],  # noqa: B006
) -> None:
    """Train, judge and compare recipes x seeds: the main job. One table and one report; goes on where interrupted."""
    from unmoved.experiments import compare as grid
    from unmoved.experiments import jobs as plans
    from unmoved.reports import report as reports

    numbers, chapters = _seeds(seeds), _chapters(analyze)
    parsed = plans.read(recipes, overrides, sweep)
    runs_each = splits * permutations if splits else len(numbers)
    cluster = _cluster(on, ray_address, cpus_per_run, gpus_per_run)
    threads = cluster.cpus if cluster else grid.threads_each(len(parsed) * runs_each, workers)
    runs_words = f"{splits} parts, {permutations} permutation(s)" if splits else _count(numbers, "seed")
    jobs = plans.jobs_of(parsed, numbers, out, allow, threads, attacks, splits=splits, permutations=permutations)
    runs = _made([replace(job, analyze=chapters, analysis_n=analysis_n) for job in jobs], workers, cluster)
    if finalists:
        with screen.follow() as follow:
            best = grid.finals(runs, finalists, final_n, allow=allow, progress=follow)
        screen.print_summary({run.name: run.verdict_outcomes for run in best})
    extra = _analysed(runs, chapters, analysis_n, allow, out) if chapters else []
    path = reports.write(runs, out / "report.html", extra=extra, title=f"{_count(parsed, 'recipe')}, {runs_words}")
    named = {f"{run.name} seed {run.seed}" if runs_each > 1 else run.name: run for run in runs}
    screen.print_summary({name: run.outcomes for name, run in named.items()})
    for name, run in named.items():
        screen.print_estimate(run.sampled if run.shown == "sampled" else None, name)
    screen.say(f"report: {path}")


def _seeds(seeds: str) -> list[int]:
    from unmoved.core.errors import UnmovedError

    try:
        return [int(seed) for seed in seeds.split(",")]
    except ValueError:
        raise UnmovedError(f"--seeds: expected whole numbers such as 0,1,2, came {seeds!r}") from None


def _chapters(analyze: str) -> tuple[str, ...]:
    """Return the names of the analyses in ``--analyze``, each once, in their own order."""
    from unmoved.analyses import studies
    from unmoved.core.errors import require_choice

    asked = [name.strip() for name in analyze.split(",") if name.strip()]
    for name in asked:
        require_choice("--analyze", name, studies.STUDIES)
    return tuple(name for name in studies.STUDIES if name in asked)


def _made(jobs: list[Job], workers: int | None, cluster: Cluster | None) -> list[Run]:
    """Train and judge the runs, and show how far they are."""
    from unmoved.core import messages
    from unmoved.experiments import compare as grid

    watch = GridWatch(jobs)
    with messages.shown(lambda words: screen.say(words, error=True)), screen.bars(timed=False) as add:
        advance = add(_count(jobs, "run"), 1.0)

        def done(job: Job, error: str | None) -> None:
            watch.ended.add(job.path)
            screen.say(f"{'failed' if error else 'done'}: {job.label} ({watch.look()[1]})")

        def poll() -> None:
            advance(*watch.look())

        return grid.compare(jobs, workers=workers, on_done=done, poll=poll, cluster=cluster)


def _analysed(runs: Sequence[Run], names: Sequence[str], n: int, allow: Sequence[str], out: Path) -> list[Section]:
    """Analyse the runs, save what came out, and return its chapters for the report."""
    from unmoved.experiments.report_chapters import FOLDER, chapters

    with screen.follow() as follow:
        return chapters(runs, names, n, allow=allow, out=out / FOLDER, progress=follow)


def _analysed_before(runs: Sequence[Run], allow: Sequence[str]) -> list[Section]:
    """Return the chapters that the comparison of these runs had; without those that cannot be made here, and say so."""
    from unmoved.core.errors import UnmovedError
    from unmoved.experiments.report_chapters import analysed, chapters

    sections: list[Section] = []
    try:
        with screen.follow() as follow:
            found = analysed(runs)
            for n, names in groupby(found, key=lambda name: found[name]):
                sections += chapters(runs, [*names], n, allow=allow, progress=follow)
    except UnmovedError as error:
        screen.say(f"note: the report lacks analyses that the comparison of these runs has: {error}", error=True)
    return sections


def _cluster(on: str, address: str | None, cpus: int | None, gpus: float | None) -> Cluster | None:
    """Return the cluster on which the runs are made; None for processes of this machine."""
    from unmoved.core.errors import UnmovedError, require_choice
    from unmoved.experiments.ray_cluster import Cluster

    require_choice("--on", on, ("local", "ray"))
    if on == "ray":
        return Cluster(address, cpus or 1, gpus or 0.0)
    if (address, cpus, gpus) != (None, None, None):
        raise UnmovedError("--ray-address, --cpus-per-run and --gpus-per-run say how --on ray works; give that too")
    return None


def _count(things: Sequence[object], name: str) -> str:
    return f"{len(things)} {name}{'s' if len(things) != 1 else ''}"


@app.command(
    add_help_option=False,
    context_settings={"ignore_unknown_options": True, "allow_extra_args": True, "allow_interspersed_args": False},
)
def analyze(context: typer.Context) -> None:
    """Say why models are robust, and at what price. Tables and figures; goes on where interrupted."""
    from unmoved.cli import analyze_command  # the studies declare options, and take seconds to import

    typer.main.get_command(analyze_command.app)(context.args, prog_name=context.command_path)


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Evaluated run folders.")],
    out: Annotated[Path, typer.Option(help="The HTML file to write.")] = Path("report.html"),
    title: Annotated[str, typer.Option(help="Its heading.")] = "Robustness report",
    allow: Allow = [],  # noqa: B006
) -> None:
    """Draw one self-contained HTML report of evaluated runs, with the analyses that a comparison of them has."""
    from unmoved.reports import report as reports
    from unmoved.runs import folder as folders

    opened = [folders.Run.open(run) for run in runs]
    path = reports.write(opened, out, title=title, extra=_analysed_before(opened, allow))
    screen.say(f"report: {path}")
