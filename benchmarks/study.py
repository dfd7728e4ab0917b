"""Make the runs of docs/studies/protocol.md and their tables; what has its tables is not made again.

    python benchmarks/study.py mnist --data YOUR/MNIST [--seeds 0,1,2] [--only TRADES,SENSE] [--workers 2]
    python benchmarks/study.py mnist-l2 --data YOUR/MNIST        # after mnist: settings are as chosen there
    python benchmarks/study.py cifar10 --data YOUR/IMAGES        # a folder with train/CLASS/ and test/CLASS/
    python benchmarks/study.py digits                            # scikit-learn's, which come with the package
    python benchmarks/study.py mnist --data YOUR/MNIST --complete TRADES:0
    python benchmarks/study.py mnist --data YOUR/MNIST --on ray --ray-address HOST:PORT

A job is a method with a seed: where the method, or what it is added to, is tuned and a value was not tried yet, a
short run of that value; then the run, its attacks, the doctor and the analyses. Runs go to ``--out``, where an
interrupted job goes on; tables to ``--results``/STUDY, each as soon as it is there: tuning.csv, runs.csv and
METHOD-seedK.csv.gz. ``--complete`` asks AutoAttack about every image of a run whose folder is here, going on from its
sample.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pandas as pd
import torch
from study_measures import hardware_of, measured
from study_methods import METHODS, STUDIES, methods_of, needs_folder, recipe_of
from study_tables import alone_if_free, choice, outcomes_path, read, record, zipped

from unmoved.core.errors import UnmovedError
from unmoved.core.files import write_atomic
from unmoved.evaluation.outcomes import CLEAN, WORST, by_sample, wilson
from unmoved.experiments import compare, local_pool, ray_cluster
from unmoved.runs import records
from unmoved.runs.evaluate import evaluate_run, examine_run
from unmoved.runs.folder import Run, folder_name
from unmoved.runs.load import Opened, opened, weights_digest
from unmoved.runs.records import Evaluation
from unmoved.runs.train import train_recipe
from unmoved.training.step import Diverged

TUNING_SEED = 100
WITHIN = 0.5  # points that the interval of a sampled verdict reaches
GRADES = ("do not believe", "look closer", "note")
Settings = dict[str, float]


@dataclass(frozen=True)
class Job:
    """A method with a seed.

    Attributes:
        data: the folder of the images.
        out, results: the folders of runs and of tables.
        complete: AutoAttack is to be asked about every image.
    """

    study: str
    method: str
    seed: int
    data: Path | None
    out: Path
    results: Path
    complete: bool = False

    @property
    def label(self) -> str:
        return f"{self.method} seed {self.seed}"

    @property
    def tables(self) -> Path:
        return self.results / self.study

    @property
    def folder(self) -> Path:
        return self.out / self.study / folder_name(self.method) / f"seed{self.seed}"

    @property
    def outcomes(self) -> Path:
        return outcomes_path(self.tables, self.method, self.seed)

    def row(self) -> dict[str, str] | None:
        """Return what the table of runs says of it, if all its tables are there."""
        rows = [r for r in read(self.tables / "runs.csv") if (r["method"], r["seed"]) == (self.method, str(self.seed))]
        return rows[0] if rows and (rows[0]["failed"] or self.outcomes.exists()) else None

    @property
    def is_done(self) -> bool:
        row = self.row()
        return row is not None and (not self.complete or bool(row["failed"]) or row["complete"] == "yes")


# --- tuning


def added_to(method: str) -> list[str]:
    """Return the methods whose chosen settings hold for a method too."""
    about = METHODS[method]
    return list(about.get("settings_of", [about["base"]] if "base" in about else []))


def settings_of(study: str, method: str, results: Path, make: Callable[[str, float], None] | None = None) -> Settings:
    """Return the settings chosen for a method and for what it is added to, by name.

    Args:
        make: what tries a value of a method, and writes its row; without it the rows must be there.

    Raises:
        UnmovedError: a value was not tried, and there is nothing that could.
    """
    found = Settings()
    for other in added_to(method):
        found |= settings_of(study, other, results, make)
    if "tuned" not in METHODS[method]:
        return found
    name, values = METHODS[method]["tuned"]
    path = results / STUDIES[study].get("settings_of", study) / "tuning.csv"

    def rows() -> list[dict[str, str]]:
        return [row for row in read(path) if row["method"] == method and float(row["value"]) in values]

    while missing := [value for value in values if value not in {float(row["value"]) for row in rows()}]:
        if make is None:
            raise UnmovedError(
                f"{path}: expected a row for each of {name} = {', '.join(map(str, values))} of {method}, came none for "
                f"{', '.join(map(str, missing))}; run `benchmarks/study.py {path.parent.name}` first"
            )
        for value in missing:
            make(method, value)
        time.sleep(0.2)  # other processes may be at work on what is still missing
    return found | {name: choice(rows(), values)}


def tune(job: Job, method: str, value: float) -> None:
    """Train a method briefly with a value of its setting and judge it on validation images, unless somebody else is."""
    name = METHODS[method]["tuned"][0]
    others = Settings()  # which `settings_of` has seen to before
    for other in added_to(method):
        others |= settings_of(job.study, other, job.results)
    folder = job.out / job.study / "tuning" / f"{folder_name(method)}-{value:g}"
    with alone_if_free(folder) as is_free:
        path = job.tables / "tuning.csv"
        if not is_free or any(r["method"] == method and float(r["value"]) == value for r in read(path)):
            return
        recipe = recipe_of(job.study, method, others | {name: value}, TUNING_SEED, data=job.data, is_trial=True)
        row: dict[str, object] = {"method": method, "setting": name, "value": value, "seed": TUNING_SEED}
        row |= {"clean": 0, "worst": 0, "n": 1, "seconds": "", "torch": torch.__version__, "failed": ""}
        try:
            run = train_recipe(recipe, folder, resume=True)
            table = by_sample(evaluate_run(run, validation=True, workers=1)["validation"], is_checked=True)
            row |= {"clean": int(table[CLEAN].sum()), "worst": int(table[WORST].sum()), "n": len(table)}
            row["seconds"] = round(float(run.metrics["seconds"].iloc[-1]), 1)
        except Diverged as error:
            row["failed"] = str(error)
        record(path, row, ("method", "value"))


# --- runs


def work(job: Job) -> None:
    """Make what a job lacks, in this process and on one thread, and write its tables."""
    torch.set_num_threads(1)
    if job.is_done:
        return
    if job.complete and not (job.folder / "recipe.toml").exists():
        raise UnmovedError(
            f"{job.folder}: expected the run whose verdict is to be completed, came none; complete it where it was made"
        )
    make = None if "settings_of" in STUDIES[job.study] else lambda name, value: tune(job, name, value)
    settings = settings_of(job.study, job.method, job.results, make)
    recipe = recipe_of(job.study, job.method, settings, job.seed, data=job.data)
    said = " ".join(f"{name}={value:g}" for name, value in settings.items())
    row = dict.fromkeys(COLUMNS, "") | {"method": job.method, "seed": job.seed, "setting": said}
    row["torch"] = torch.__version__
    try:
        run = train_recipe(recipe, job.folder, resume=True)
    except Diverged as error:
        record(job.tables / "runs.csv", row | {"failed": str(error)}, ("method", "seed"))
        return

    @cache
    def ready() -> Opened:
        return opened(run, "best", "auto", ())

    judge(run, job, ready)
    row |= figures(run) | measured(run, ready()) | {"hardware": hardware_of(run)}
    write_atomic(job.outcomes, zipped(images_of(run)))
    record(job.tables / "runs.csv", row, ("method", "seed"))


COLUMNS = ("method", "seed", "setting", "n", "clean", "pgd40", "left", "low", "high", "population_low")
COLUMNS += ("population_high", "asked", "survivors", "near", "near_broken", "far_asked", "far_broken", "error")
COLUMNS += ("complete", "seconds", "forward", "backward", "grade", "doctor", "flatness", "softmax", "variance")
COLUMNS += ("variance_attacked", "hardware", "torch", "failed")


def judge(run: Run, job: Job, ready: Callable[[], Opened]) -> None:
    """Run PGD-40, AutoAttack and the doctor, going on where they stand."""
    digest = weights_digest(run, "best")

    def has(facts: Evaluation | None) -> bool:
        return facts is not None and facts["weights_sha256"] == digest

    if not has(run.evaluation):
        evaluate_run(run, workers=1, ready=ready)
    is_sampled = STUDIES[job.study]["sampled"] and not job.complete
    if not has(run.verdict) and not (is_sampled and has(run.sampled)):
        evaluate_run(run, attacks="standard", within=WITHIN if is_sampled else None, workers=1, ready=ready)
    examine_run(run, ready=ready)  # of the number that is shown now


def figures(run: Run) -> dict[str, object]:
    """Return what the attacks and the doctor say of a run: counts of images, and shares of all images like these."""
    pgd, doctor = run.outcomes, run.doctor
    assert pgd is not None
    assert doctor is not None
    right = by_sample(pgd, is_checked=True)
    found = [finding["grade"] for finding in doctor["findings"]]
    row: dict[str, object] = {"n": len(right), "clean": int(right[CLEAN].sum()), "pgd40": int(right["pgd40"].sum())}
    row |= {"grade": next((grade for grade in GRADES if grade in found), "clear")}
    row |= {"doctor": doctor.get("sentence", ""), "seconds": round(float(run.metrics["seconds"].iloc[-1]), 1)}
    if run.shown == "sampled":
        estimate = records.estimate(run.sampled)
        assert estimate is not None
        counts = ("survivors", "near", "near_broken", "far_asked", "far_broken", "error")
        row |= {name: getattr(estimate, name) for name in counts} | {"complete": "no", "asked": estimate.asked}
        row |= {"left": round(estimate.left, 3)} | dict(zip(("low", "high"), estimate.interval, strict=True))
        shares = estimate.population
    else:
        table = run.verdict_outcomes
        assert table is not None
        left = int(by_sample(table, is_checked=True)[WORST].sum())
        row |= {"complete": "yes", "asked": len(table), "left": left, "low": left, "high": left}
        shares = wilson(left, len(table))
    return row | {"population_low": round(shares[0], 6), "population_high": round(shares[1], 6)}


def images_of(run: Run) -> pd.DataFrame:
    """Return one row a test image: index, label, clean_prediction; 1 where PGD-40, `quick`, AutoAttack do not leave it.

    Nothing stands where an attack was not asked; a misclassified image is left by none.
    """
    table, shown = run.outcomes, run.shown
    assert table is not None
    images = table.set_index("index")[["label", "clean_prediction"]].assign(
        pgd40=table["success"].astype(int).to_numpy()
    )
    asked = run.asked_outcomes if shown == "sampled" else run.verdict_outcomes
    for name, other in (("quick", run.sampled_outcomes), ("autoattack", asked)):
        broken = pd.Series(dtype="Int64") if other is None else other.set_index("index")["success"].astype("Int64")
        images[name] = broken.reindex(images.index)
    return images.assign(asked=images["autoattack"].notna().astype(int)).reset_index().sort_values("index")


# --- the command


def jobs_of(args: argparse.Namespace) -> list[Job]:
    """Return the jobs in the order of the protocol: seed 0 of all methods, then seed 1, ..."""
    if args.data is None and needs_folder(args.study):
        raise UnmovedError(f"{args.study}: expected the folder of its images, came none; give --data FOLDER")
    methods = [method for method in methods_of(args.study) if method in METHODS]
    paths = (args.data, args.out.absolute(), args.results.absolute())
    if args.complete:
        named = [text.rpartition(":") for text in args.complete]
        pairs = [(method, seed) for method, _, seed in named]
    else:
        asked = [name.strip() for name in args.only.split(",")] if args.only else methods
        seeds = args.seeds.split(",") if args.seeds else STUDIES[args.study]["seeds"]
        pairs = [(method, seed) for seed in seeds for method in methods if method in asked]
        pairs += [(method, "0") for method in asked if method not in methods]
    for method, seed in pairs:
        if method not in methods or not str(seed).isdecimal():
            raise UnmovedError(
                f"{args.study}: expected a whole seed and a method of {', '.join(methods)}; came {method!r}, {seed!r}"
            )
    return [Job(args.study, method, int(seed), *paths, complete=bool(args.complete)) for method, seed in pairs]


def run_all(jobs: Sequence[Job], args: argparse.Namespace) -> dict[str, str]:
    """Do the jobs whose tables are not there; return the error of each that failed."""
    todo, failed = [job for job in jobs if not job.is_done], dict[str, str]()
    for job in todo:  # what can be known now is
        if "settings_of" in STUDIES[job.study]:
            settings_of(job.study, job.method, job.results)
    if args.on == "ray":
        cluster = ray_cluster.Cluster(args.ray_address, gpus=args.gpus_per_run)
        ended = ray_cluster.each(work, todo, args.workers or len(todo), cluster=cluster, shared=args.out.absolute())
    else:
        ended = local_pool.each(work, todo, compare.processes(len(todo), args.workers))
    with closing(ended) as answers:
        for count, (number, error) in enumerate(answers, 1):
            job = todo[number]
            label, row = f"{job.study}: {job.label}", job.row()
            said = str(error) if error else f"failed: {row['failed']}" if row and row["failed"] else _words(row)
            print(f"[{count}/{len(todo)}] {label}: {said}", file=sys.stderr, flush=True)
            if error:
                failed[label] = f"{type(error).__name__}: {error}"
    return failed


def _words(row: dict[str, str] | None) -> str:
    if row is None:
        return "no table"
    clean, pgd, left, low, high = (
        100 * float(row[name]) / int(row["n"]) for name in ("clean", "pgd40", "left", "low", "high")
    )
    return f"clean {clean:.1f}, PGD-40 {pgd:.1f}, AutoAttack {left:.1f} [{low:.1f}, {high:.1f}], {row['grade']}"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", choices=STUDIES)
    parser.add_argument("--data", type=lambda text: Path(text).absolute(), help="the folder of the images")
    parser.add_argument("--out", type=Path, default=Path("runs/study"))
    parser.add_argument("--results", type=Path, default=Path("docs/results"))
    parser.add_argument("--seeds", help="with commas between")
    parser.add_argument("--only", help="methods, with commas between")
    parser.add_argument("--complete", action="append", metavar="METHOD:SEED")
    parser.add_argument("--workers", type=int, help="processes at a time; one a core by default")
    parser.add_argument("--on", choices=("local", "ray"), default="local")
    parser.add_argument("--ray-address")
    parser.add_argument("--gpus-per-run", type=float, default=0.0)
    args = parser.parse_args(arguments)
    try:
        failed = run_all(jobs_of(args), args)
    except UnmovedError as error:
        raise SystemExit(f"error: {error}") from None
    if failed:
        raise SystemExit("\n".join(f"error: {label}: {words}" for label, words in failed.items()))


if __name__ == "__main__":
    # Other processes find `work` by the name of its module, which is not __main__ there.
    sys.argv[0] = os.path.abspath(__file__)  # whose folder Ray shows its processes
    from study import main as imported

    imported()
