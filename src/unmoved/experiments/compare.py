"""Train and evaluate every recipe with every seed, in parallel. Finished runs are not repeated."""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable, Collection, Generator, Sequence
from contextlib import closing
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

import torch

from unmoved.core.errors import UnmovedError
from unmoved.core.files import write_atomic
from unmoved.core.untrusted import readable
from unmoved.evaluation import outcomes
from unmoved.experiments import local_pool
from unmoved.experiments import ray_cluster as clusters
from unmoved.experiments.jobs import Job
from unmoved.experiments.local_pool import JobError
from unmoved.runs import recipe as config
from unmoved.runs.assembly import Assembly
from unmoved.runs.evaluate import evaluate_run, examine_run
from unmoved.runs.folder import Run
from unmoved.runs.load import Opened, opened, weights_digest
from unmoved.runs.records import digest_of_outcomes
from unmoved.runs.train import train_recipe

ERROR = "error.txt"  # of a run folder: the traceback of a job that failed
DOCTOR_SAMPLES = 32  # enough to see masked gradients; `unmoved doctor RUN` looks at more


def work(job: Job, device: str = "auto") -> str:
    """Train and judge one job in this process, or resume it; return the run's folder.

    It uses ``job.threads`` threads, but never more than torch is set to here.

    Raises:
        UnmovedError: a mistake of the user.
        JobError: any other error; its traceback is in ``error.txt`` of the run folder until the job succeeds.
    """
    ceiling, traces = torch.get_num_threads(), Path(job.path) / ERROR
    torch.set_num_threads(min(job.threads or ceiling, ceiling))
    try:
        folder = _done(job, device)
        traces.unlink(missing_ok=True)
        return folder
    except UnmovedError:
        raise
    except Exception as error:
        message = f"{type(error).__name__}: {error}"
        try:
            write_atomic(traces, traceback.format_exc().encode("utf-8", "backslashreplace"))
        except UnmovedError:  # for example the same full disk that ended the job
            raise JobError(message) from error
        raise JobError(f"{message} (traceback in {traces})") from error
    finally:
        torch.set_num_threads(ceiling)


def _done(job: Job, device: str) -> str:
    recipe, tests = config.parse(job.tables), []

    # At most once for all steps, and not at all if everything is done.
    @cache
    def build() -> Assembly:
        return Assembly(recipe, job.allow)

    @cache
    def ready() -> Opened:
        tests.append(build().data.test)  # held, so that not every step reads it again
        return opened(run, "best", device, job.allow, assembly=build())

    run = train_recipe(recipe, job.path, resume=True, allow=job.allow, device=device, build=build)
    done = run.evaluation
    asked = weights_digest(run, "best"), readable(job.attacks)
    if done is None or (done["weights_sha256"], done.get("asked")) != asked:
        evaluate_run(run, attacks=job.attacks, device=device, allow=job.allow, ready=ready)
    if not _is_examined(run):
        examine_run(run, n=DOCTOR_SAMPLES, device=device, allow=job.allow, ready=ready)
    if job.analyze:
        from unmoved.analyses import studies  # imported here, since it loads all figures

        (subject,) = studies.subjects([run], job.analysis_n, device=device, allow=job.allow, ready=ready)
        for name in job.analyze:
            studies.STUDIES[name].for_report().prepare(subject)
    return job.path


def _is_examined(run: Run) -> bool:
    """Return whether the doctor was run on the weights and outcomes behind the reported number."""
    doctor, shown = run.doctor, run.facts(run.shown)
    if doctor is None or doctor["weights_sha256"] != weights_digest(run, "best"):
        return False
    return doctor.get("evaluation") == (None if shown is None else digest_of_outcomes(shown))


def processes(jobs: int, workers: int | None = None) -> int:
    """Return how many processes of this machine make the runs: one per core, unless the user chose a number."""
    return max(1, min(workers or os.cpu_count() or 1, jobs))


def threads_each(jobs: int, workers: int | None = None) -> int:
    """Divide the threads that the user (OMP_NUM_THREADS) or torch has set among these processes.

    More threads than cores would slow everything down, since waiting threads keep cores busy.
    """
    return max(1, torch.get_num_threads() // processes(jobs, workers))


def compare(
    jobs: Sequence[Job],
    *,
    workers: int | None = None,
    on_done: Callable[[Job, str | None], None] | None = None,
    poll: Callable[[], None] | None = None,
    cluster: clusters.Cluster | None = None,
) -> list[Run]:
    """Run the grid in a pool of processes and return the finished runs; one failure does not stop the others.

    A run whose process dies is resumed once, in another process.

    Args:
        workers: processes at a time; by default one per core of this machine, or as many as the cluster has room for.
        on_done: called with each job and its error message, or None.
        poll: called a few times a second, for a progress display.
        cluster: the Ray cluster whose machines do the work, instead of processes of this one; they must see the runs'
            folders.

    Raises:
        UnmovedError: after all jobs ended, naming those that failed; what finished stays on disk. As
            `unmoved.experiments.ray_cluster.each`, at once.
    """
    failures: dict[str, str] = {}
    with closing(_ended(jobs, workers, poll, cluster)) as ended:
        for number, error in ended:
            label = jobs[number].label
            if error is not None:
                failures[label] = _words(error)
            if on_done is not None:
                on_done(jobs[number], failures.get(label))
    if failures:
        lines = "".join(f"\n  {label}: {message}" for label, message in failures.items())
        raise UnmovedError(
            f"{len(failures)} of {len(jobs)} runs failed; the others are finished, and the same command goes on with "
            f"what is missing:{lines}"
        )
    return [Run.open(job.path) for job in jobs]


def _ended(
    jobs: Sequence[Job], workers: int | None, poll: Callable[[], None] | None, cluster: clusters.Cluster | None
) -> Generator[tuple[int, BaseException | None]]:
    """Do the jobs; yield each one's number as it ends, with its error or None."""
    if cluster is None:
        return local_pool.each(work, jobs, processes(len(jobs), workers), poll)
    sent = [replace(job, path=os.path.abspath(job.path)) for job in jobs]
    return clusters.each(
        partial(work, device="auto" if cluster.gpus else "cpu"),
        sent,
        min(workers or len(jobs), len(jobs)),
        poll,
        cluster=cluster,
        shared=Path(os.path.commonpath([Path(job.path).parent for job in sent])) if sent else Path(),
    )


def finals(
    runs: Sequence[Run],
    count: int,
    n: int | None,
    *,
    allow: Collection[str] = (),
    progress: Callable[[float, str], None] | None = None,
) -> list[Run]:
    """Run AutoAttack standard on ``n`` test images of the ``count`` best runs by worst case, and return these runs.

    The doctor is run again, since AutoAttack's figure is then the reported one.
    """
    ranked = sorted(runs, key=lambda run: -_worst(run))[:count]
    for number, run in enumerate(ranked):

        def advance(share: float, words: str, number: int = number, name: str = run.name) -> None:
            if progress is not None:
                progress((number + share) / len(ranked), f"{name} {words}")

        done, asked = run.verdict, (weights_digest(run, "best"), n or config.parse(run.recipe).evaluation.n)
        if done is None or (done["weights_sha256"], done.get("asked_n", -1)) != asked:
            evaluate_run(run, attacks="standard", n=n, allow=allow, progress=advance)
        if not _is_examined(run):
            examine_run(run, n=DOCTOR_SAMPLES, allow=allow, progress=advance)
    return ranked


def _worst(run: Run) -> float:
    table = run.outcomes
    return 0.0 if table is None else float(outcomes.by_sample(table, is_checked=True)[outcomes.WORST].mean())


def _words(error: BaseException) -> str:
    if isinstance(error, local_pool.ProcessDied):
        return f"its process was ended from outside (out of memory, or killed), {local_pool.DEATHS} times"
    return str(error) if isinstance(error, UnmovedError | JobError) else f"{type(error).__name__}: {error}"
