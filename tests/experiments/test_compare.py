"""Recipes x seeds in a pool of processes: what is done stays done, what fails stops nobody else."""

from __future__ import annotations

import multiprocessing
import os
import re
import shutil
import signal
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from helpers.cli import RECIPE, here, recipe, unmoved

from unmoved.analyses import studies
from unmoved.core.errors import UnmovedError
from unmoved.data.stored_arrays import Stored
from unmoved.experiments import compare as grid
from unmoved.experiments.jobs import Job, jobs_of
from unmoved.runs import evaluate
from unmoved.runs import recipe as config
from unmoved.runs.assembly import Assembly
from unmoved.runs.evaluate import evaluate_run
from unmoved.runs.folder import Run


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two recipes with two seeds each, run by two processes."""
    folder = tmp_path_factory.mktemp("compared")
    one = recipe(folder, RECIPE, "one")
    two = recipe(folder, RECIPE.replace("[objective.ce]", "[objective.trades]"), "two")
    command = ["compare", one, two, "--seeds", "0,1", "--workers", "2", "--out", folder / "out"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("os.cpu_count", lambda: 2)  # one thread a process, as here, so that bits can be compared
        said = unmoved(*command, "--set", "training.epochs=1").fine()
    (folder / "said").write_text(said.out)
    return folder


def files(folder: Path) -> dict[str, int]:
    return {str(p.relative_to(folder)): p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file()}


def runs_below(folder: Path) -> list[Path]:
    return sorted(path.parent for path in folder.glob("*/*/recipe.toml"))


def test_the_grid_is_trained_judged_and_reported(compared: Path) -> None:
    out = compared / "out"
    name = compared.name
    folders = [path.relative_to(out).as_posix() for path in runs_below(out)]
    assert folders == [f"{name}-{which}/seed{seed}" for which in ("one", "two") for seed in (0, 1)]
    for path in runs_below(out):
        run = Run.open(path)
        assert path.name == f"seed{run.seed}"
        assert run.evaluation["n"] == 30
        assert run.metrics["epoch"].tolist() == [1]
    page = (out / "report.html").read_text()
    assert f"{name}/one" in page
    assert f"{name}/two" in page
    said = (compared / "said").read_text()
    assert said.count("done: ") == 4
    assert f"{name}/two seed 1" in said
    assert f"report: {out / 'report.html'}" in said


def test_seeds_differ_and_a_seed_in_the_grid_is_the_same_run_as_alone(compared: Path) -> None:
    one = compared / "out" / f"{compared.name}-one"
    weights = {seed: (one / f"seed{seed}" / "best.safetensors").read_bytes() for seed in (0, 1)}
    assert weights[0] != weights[1]
    alone = compared / "alone"
    unmoved(
        "train", compared / "one.toml", "--out", alone, "--set", "training.epochs=1", "--set", "training.seed=1"
    ).fine()
    assert (alone / "best.safetensors").read_bytes() == weights[1]


def test_a_second_call_does_nothing_new(compared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here(monkeypatch)
    out, command = tmp_path / "out", ["compare", compared / "one.toml", compared / "two.toml", "--seeds", "0,1"]
    command += ["--set", "training.epochs=1", "--out", out]
    shutil.copytree(compared / "out", out)
    runs, before = runs_below(out), files(out)
    (out / "report.html").unlink()
    unmoved(*command).fine()
    after = files(out)
    assert {name for name in before if after[name] != before[name] and "report" not in name} == set()
    assert (out / "report.html").exists()
    # Only what is missing is done: one evaluation; and one that judged other weights than the best.
    (runs[0] / "evaluation" / "evaluation.json").unlink()
    (runs[1] / "last.safetensors").write_bytes((runs[0] / "last.safetensors").read_bytes())
    unmoved("evaluate", runs[1], "--weights", "last", "--n", "10").fine()  # the doctor, too, looked at other weights
    before = files(out)
    unmoved(*command).fine()
    after = files(out)
    assert {name for name in before if after[name] != before[name] and "report" not in name} == {
        f"{runs[k].relative_to(out).as_posix()}/evaluation/{name}"
        for k in (0, 1)
        for name in ("outcomes.csv", "curve.csv", "gallery.npz", "evaluation.json")
        if k or name != "evaluation.json"
    } | {f"{runs[1].relative_to(out).as_posix()}/doctor.json"}
    assert (runs[0] / "evaluation" / "evaluation.json").exists()
    assert Run.open(runs[1]).evaluation["n"] == 30


def test_failures_are_named_and_stop_nobody_else(
    compared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first recipe diverges, the second one's process is killed; the third is trained, the last was done."""
    here(monkeypatch)
    out = tmp_path / "out"
    shutil.copytree(compared / "out", out)
    before = files(out)
    recipes = [
        recipe(tmp_path, 'name = "bad"\n' + RECIPE.replace('use = "adam"\nlr = 0.01', 'use = "sgd"\nlr = 1e30'), "bad"),
        recipe(tmp_path, 'name = "killed"\n' + RECIPE, "killed"),
        recipe(tmp_path, 'name = "new"\n' + RECIPE, "new"),
        compared / "one.toml",
    ]
    said = unmoved("compare", *recipes, "--out", out, "--set", "training.epochs=1")
    message = said.mistake()
    assert message.startswith("2 of 4 runs failed; the others are finished, and the same command goes on")
    assert re.search(r"bad seed 0: the loss became (nan|inf) at step \d", message)
    assert "killed seed 0: its process was ended from outside (out of memory, or killed)" in message
    assert sorted(line.partition(" (")[0] for line in said.out.splitlines()) == [
        f"done: {compared.name}/one seed 0",
        "done: new seed 0",
        "failed: bad seed 0",
        "failed: killed seed 0",
    ]
    after = files(out)
    assert {key: after[key] for key in before} == before
    assert Run.open(out / "new" / "seed0").evaluation["n"] == 30


def test_a_failed_job_leaves_its_traceback_until_it_succeeds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here(monkeypatch)
    path, out = recipe(tmp_path), tmp_path / "out"
    command = ("compare", path, "--out", out, "--set", "training.epochs=1")
    traces = out / f"{tmp_path.name}-tiny" / "seed0" / "error.txt"

    def fail(error: Exception) -> str:
        def misjudge(*arguments: Any, **settings: Any) -> None:
            raise error

        with monkeypatch.context() as patch:
            patch.setattr(grid, "evaluate_run", misjudge)
            return unmoved(*command).mistake()

    assert fail(UnmovedError("expected this, came that")).endswith("tiny seed 0: expected this, came that")
    assert not traces.exists()
    message = fail(ZeroDivisionError("odd \udcff"))
    assert message.endswith(f"tiny seed 0: ZeroDivisionError: odd \\udcff (traceback in {traces})")
    text = traces.read_text(encoding="utf-8")
    assert text.startswith("Traceback (most recent call last):\n")
    assert "in misjudge\n    raise error\n" in text
    assert text.endswith("ZeroDivisionError: odd \\udcff\n")
    with monkeypatch.context() as patch:
        patch.setattr(grid, "write_atomic", misses := Mock(side_effect=UnmovedError("the disk is full")))
        assert fail(ZeroDivisionError("odd")).endswith("tiny seed 0: ZeroDivisionError: odd")
        assert misses.called
    unmoved(*command).fine()
    assert not traces.exists()


def test_processes_show_what_they_log_and_tell_what_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    jobs_made = jobs_of([config.read(recipe(tmp_path), ["training.epochs=1"])], [0, 1], tmp_path / "out", (), threads=1)
    grid.compare(jobs_made, workers=1)
    assert capfd.readouterr().err == ""
    weights = Path(jobs_made[0].path) / "last.safetensors"
    weights.unlink()
    spoilt: Any = 5  # what no user can ask for
    with pytest.raises(
        UnmovedError, match=r"1 of 2 runs failed.*\n.*tiny seed 1: AttributeError: 'int' object"
    ) as caught:
        grid.compare([jobs_made[0], replace(jobs_made[1], attacks=spoilt)], workers=1)
    traces = Path(jobs_made[1].path) / "error.txt"
    assert str(caught.value).endswith(f" (traceback in {traces})")
    assert "Error: 'int' object" in traces.read_text(encoding="utf-8")
    assert capfd.readouterr().err == f"note: {weights} was missing or damaged: restored from the trainer's state\n"


def test_a_run_whose_process_is_killed_goes_on_in_another_one_and_ends_in_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, killed = recipe(tmp_path), []
    change = ["training.epochs=30", "training.validation=0"]
    made = jobs_of([config.read(path, change)], [0, 1], tmp_path / "out", (), threads=1)
    first = Path(made[0].path)

    def kill() -> None:
        if not killed and (first / "trainer.previous.pt").exists():
            killed.extend(child.pid for child in multiprocessing.active_children())
            os.kill(killed[0], signal.SIGKILL)

    ended: list[tuple[str, str | None]] = []
    runs = grid.compare(made, workers=1, on_done=lambda job, error: ended.append((job.path, error)), poll=kill)
    assert len(killed) == 1
    # Its second chance comes after the others.
    assert ended == [(made[1].path, None), (made[0].path, None)]
    assert [run.evaluation["n"] for run in runs] == [30, 30]
    unmoved("train", first / "recipe.toml", "--out", tmp_path / "alone").fine()
    assert (first / "last.safetensors").read_bytes() == (tmp_path / "alone" / "last.safetensors").read_bytes()


def test_finalists_are_judged_once(compared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Asked again the verdict stands, with a number of images or without; another number is another question."""
    run = Run(shutil.copytree(runs_below(compared / "out")[0], tmp_path / "run"))
    written = (run.path / "recipe.toml").read_text()
    (run.path / "recipe.toml").write_text(written.replace("n = 30", "n = 1"))
    asked: list[int | None] = []

    def judge(run: Run, *, attacks: str, n: int | None, **how: Any) -> Any:
        asked.append(n)
        return evaluate_run(run, attacks=attacks, n=n, **how)

    monkeypatch.setattr(grid, "evaluate_run", judge)
    for n in (2, 2, None, None, 2):
        assert grid.finals([run], 1, n) == [run]
        assert run.verdict["n"] == (n or 1)  # one is what the recipe says
    assert asked == [2, None, 2]


# --- the grid itself


def jobs(tmp_path: Path, names: list[str], seeds: list[int]) -> list[Job]:
    parsed = [config.read(recipe(tmp_path), [f"name={name}"]) for name in names]
    return jobs_of(parsed, seeds, tmp_path / "out", ("lab",), threads=2)


@pytest.mark.parametrize(
    ("attacks", "words"),
    [
        ("autoatack", "--attacks: expected names of .*came 'autoatack'"),
        ("pgd(stepz=3)", "unknown key 'stepz'"),
        ("pgd(eps=0.2)", "expected eps of at most the threat model's 0.1"),
        ("my_lab:Mine", "--allow my_lab"),
        ("transfer:runs/none", "runs/none"),
        ("", "expected at least one name"),
    ],
)
def test_attacks_that_do_not_exist_are_refused_before_anything_is_trained(
    tmp_path: Path, attacks: str, words: str
) -> None:
    said = unmoved("compare", recipe(tmp_path), "--attacks", attacks, "--out", tmp_path / "out").mistake()
    assert re.search(words, said), said
    assert not (tmp_path / "out").exists()


def test_jobs_are_recipes_times_seeds(tmp_path: Path) -> None:
    made = jobs(tmp_path, ["a", "b"], [0, 7])
    assert [(job.label, Path(job.path).relative_to(tmp_path).as_posix()) for job in made] == [
        ("a seed 0", "out/a/seed0"),
        ("a seed 7", "out/a/seed7"),
        ("b seed 0", "out/b/seed0"),
        ("b seed 7", "out/b/seed7"),
    ]
    assert {(job.epochs, job.allow, job.threads) for job in made} == {(2, ("lab",), 2)}


@pytest.mark.parametrize(
    ("names", "seeds", "words"),
    [
        (["a", "a"], [0], "expected recipes of different names, came 'a' twice; set name=... in one"),
        (["a/b", "a-b"], [0], "expected recipes of different names, came 'a/b' twice"),  # one folder for both
        (["a"], [0, 1, 0], "expected different seeds, came 0 twice"),
    ],
)
def test_two_jobs_never_share_a_folder(tmp_path: Path, names: list[str], seeds: list[int], words: str) -> None:
    with pytest.raises(UnmovedError, match=words):
        jobs(tmp_path, names, seeds)


def test_seeds_that_are_none(tmp_path: Path) -> None:
    path = recipe(tmp_path)
    for seeds in ("0,one", "", "0,"):
        message = unmoved("compare", path, "--out", tmp_path / "out", "--seeds", seeds).mistake()
        assert "--seeds: expected whole numbers such as 0,1,2" in message
    twice = unmoved("compare", path, path, "--out", tmp_path / "out")
    assert "expected recipes of different names" in twice.mistake()
    assert not (tmp_path / "out").exists()


# --- threads


@pytest.mark.parametrize(
    ("set_to", "cores", "jobs", "workers", "each"),
    [
        (4, 4, 2, None, 2),
        (4, 64, 100, 2, 2),
        (1, 8, 1, None, 1),
        (2, 8, 8, None, 1),
        (8, 8, 1, None, 8),
        (3, 2, 9, 2, 1),
    ],
)
def test_the_threads_that_are_set_are_divided_among_the_processes(
    monkeypatch: pytest.MonkeyPatch, set_to: int, cores: int, jobs: int, workers: int | None, each: int
) -> None:
    monkeypatch.setattr("torch.get_num_threads", lambda: set_to)
    monkeypatch.setattr("os.cpu_count", lambda: cores)
    assert grid.threads_each(jobs, workers) == each
    assert each == 1 or each * grid.processes(jobs, workers) <= set_to


def test_no_job_computes_with_more_threads_than_torch_is_set_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, seen = torch.get_num_threads(), []
    monkeypatch.setattr(grid, "_done", lambda job, device: seen.append(torch.get_num_threads()))
    (job,) = jobs(tmp_path, ["a"], [0])
    try:
        for set_to, asked in ((1, 2), (3, 2), (2, 0)):
            torch.set_num_threads(set_to)
            grid.work(replace(job, threads=asked))
            assert torch.get_num_threads() == set_to  # the next job of this process starts from there
    finally:
        torch.set_num_threads(before)
    assert seen == [1, 2, 2]


# --- what a job reads and makes


@pytest.fixture
def npz_recipe(tmp_path: Path) -> Path:
    """A recipe on images in a file of their own, whose every part can be seen being read."""
    x = np.random.default_rng(0).integers(0, 256, (60, 8, 8), dtype=np.uint8)
    y = np.arange(60) % 3
    np.savez(tmp_path / "mine.npz", x_train=x[:40], y_train=y[:40], x_test=x[40:], y_test=y[40:])
    data = f'use = "arrays"\npath = "{(tmp_path / "mine.npz").as_posix()}"'
    return recipe(tmp_path, RECIPE.replace('use = "digits"\ntest = 1500', data).replace("n = 30", "n = 20"))


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often something is made or read."""
    seen = Counter[str]()
    pieces, init = Stored.pieces, Assembly.__init__

    def read(self: Stored) -> Any:
        seen[self.member] += 1
        return pieces(self)

    def build(self: Assembly, *arguments: Any, **settings: Any) -> None:
        seen["built"] += 1
        init(self, *arguments, **settings)

    monkeypatch.setattr(Stored, "pieces", read)
    monkeypatch.setattr(Assembly, "__init__", build)
    return seen


def test_a_job_builds_its_recipe_once_and_reads_its_images_once(
    tmp_path: Path, npz_recipe: Path, counted: Counter[str]
) -> None:
    (job,) = jobs_of([config.read(npz_recipe)], [0], tmp_path / "out", (), threads=1)
    job = replace(job, analyze=("softmax",), analysis_n=10)
    grid.work(job)
    assert counted == {"built": 1, "x_train.npy": 1, "x_test.npy": 1}
    counted.clear()
    grid.work(replace(job, analyze=()))  # all is done: nothing is made
    assert counted == {}
    (Path(job.path) / "doctor.json").unlink()
    grid.work(replace(job, analyze=()))
    assert counted == {"built": 1, "x_test.npy": 1}


def test_judging_and_studying_read_the_test_images_alone_and_runs_share_them(
    tmp_path: Path, npz_recipe: Path, counted: Counter[str]
) -> None:
    made = jobs_of([config.read(npz_recipe)], [0, 1, 2], tmp_path / "out", (), threads=1, attacks="pgd")
    for job in made:
        grid.work(job)
    runs = [Run.open(job.path) for job in made]
    for act in (
        lambda: evaluate_run(runs[0]),
        lambda: evaluate_run(runs[0], n=5),
        lambda: evaluate.examine_run(runs[0]),
    ):
        counted.clear()
        act()
        assert counted == {"built": 1, "x_test.npy": 1}
    for n in (None, 7):
        counted.clear()
        found = studies.subjects(runs, n)
        assert counted == {"built": 3, "x_test.npy": 1}
        assert len({id(subject.split) for subject in found}) == 1
        assert len({subject.key["weights"] for subject in found}) == 3


def test_runs_on_the_same_images_in_two_files_share_one_copy(tmp_path: Path, npz_recipe: Path) -> None:
    shutil.copy(tmp_path / "mine.npz", tmp_path / "other.npz")
    parsed = [
        config.read(npz_recipe, [f"name={name}", f"data.path={tmp_path / name}.npz"]) for name in ("mine", "other")
    ]
    made = jobs_of(parsed, [0], tmp_path / "out", (), threads=1)
    for job in made:
        grid.work(job)
    first, second = studies.subjects([Run.open(job.path) for job in made], None)
    assert first.split is second.split
    assert first.key["images"] == second.key["images"]
