"""A grid on a real Ray of two workers: the same bits as from the local pool, also where workers are killed."""

from __future__ import annotations

import gc
import shutil
import socket
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.cli import RECIPE, Said, digests, here, recipe, unmoved
from helpers.deadly_jobs import Task, act, alive
from helpers.ray_jobs import failed, look, mistaken

import unmoved as package
from unmoved.core.errors import UnmovedError
from unmoved.experiments import compare, local_pool, ray_cluster
from unmoved.experiments.jobs import jobs_of
from unmoved.experiments.ray_cluster import Cluster
from unmoved.runs import recipe as config
from unmoved.runs.folder import Run

ray = pytest.importorskip("ray")
if not Path("/proc").is_dir():
    pytest.skip("these tests kill, and look after the dead in /proc", allow_module_level=True)

pytestmark = pytest.mark.filterwarnings(r"ignore:subprocess \d+ is still running:ResourceWarning")  # of Ray, see start
EPOCHS = 9
PATIENCE = 240.0  # seconds until a test gives up: machines are busy at times
# A term of a stranger, found in the folder where the command runs: its process dies as often as a file there says.
MORTAL = """
import os, signal
from pathlib import Path
from torch.nn import functional

class CrossEntropy:
    def __init__(self, name):
        self.name, self.calls = name, 0

    def __call__(self, views):
        self.calls += 1
        lives, died = Path(self.name + ".deaths"), Path(self.name + ".died")
        if self.calls == 14 and lives.exists():
            done = died.read_text() if died.exists() else ""
            if done.count("\\n") < int(lives.read_text()):
                (log,) = Path("out").glob(f"*{self.name}/seed0/metrics.jsonl")
                epochs = log.read_bytes().count(b"\\n")
                died.write_text(f"{done}{os.getpid()} {epochs}\\n")
                os.kill(os.getpid(), signal.SIGKILL)
        return functional.cross_entropy(views.adv, views.y, reduction="none")
"""


@pytest.fixture(scope="module", autouse=True)
def _as_urgent_as_others() -> Iterator[None]:
    """Ray is polite, and its workers would wait for whatever else this machine tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_worker_niceness", "0")
        yield


BUSY = "timed out during startup"  # Ray gives itself 30 s to start, whatever else its machine does


def start() -> str:
    """Start Ray with two workers; return its folder."""
    settings = {"object_store_memory": 80 * 2**20, "include_dashboard": False, "log_to_driver": False}
    for _ in range(3):
        try:  # with a GPU in name only
            found = ray.init("local", num_cpus=2, num_gpus=1, logging_level="ERROR", **settings)
            return str(found.address_info["session_dir"])
        except Exception as error:
            if BUSY not in str(error):
                raise
        gc.collect()  # what is left of a failed start complains here
    pytest.skip("this machine is too busy for Ray")


@pytest.fixture(scope="module")
def session() -> Iterator[None]:
    """Ray, as the command finds it where somebody has joined a cluster already."""
    with pytest.MonkeyPatch.context() as patch:  # what the workers find around them
        patch.setenv("PYTHONPATH", str(Path(__file__).parents[1]))
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("SLURM_NTASKS", "4")  # Ray was started by srun, on four machines
        patch.setenv("SLURM_JOB_NAME", "ray")
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_AUTH_TOKEN", uuid.uuid4().hex)  # no file of it in anybody's home
        where = start()
    yield
    ray.shutdown()
    shutil.rmtree(where, ignore_errors=True)


@dataclass(frozen=True)
class Grid:
    """A folder with recipes, where the command is given with relative paths alone."""

    folder: Path

    def compare(self, names: str, *options: object) -> Said:
        recipes = [f"{name}.toml" for name in names.split()]
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(self.folder)
            patch.setattr("os.cpu_count", lambda: 1)  # one thread a run on both ways
            return unmoved("compare", *recipes, "--allow", "mortal_here", "--out", "out", *options)

    def runs(self) -> dict[str, dict[str, str]]:
        """Run -> the sha256 of its files, without those that tell time and place."""
        return {
            path.parent.name.rpartition("-")[2]: {
                name: digest
                for name, digest in digests(path).items()
                if Path(name).suffix in (".safetensors", ".csv", ".toml")
            }
            for path in (self.folder / "out").glob("*/seed0")
        }

    def died(self, name: str) -> list[tuple[int, int]]:
        """(process, epochs done) of each death."""
        lines = (self.folder / f"{name}.died").read_text().splitlines()
        return [(int(process), int(epochs)) for process, _, epochs in (line.partition(" ") for line in lines)]


def grid(folder: Path) -> Grid:
    folder.mkdir()
    (folder / "mortal_here.py").write_text(MORTAL)
    text = RECIPE.replace("epochs = 2", f"epochs = {EPOCHS}\nvalidation = 0")
    recipe(folder, 'name = "plain"\n' + text, "plain")
    for name in ("once", "always"):
        mortal = f'[objective.ce]\nuse = "mortal_here:CrossEntropy"\nname = "{name}"'
        recipe(folder, f'name = "{name}"\n' + text.replace("[objective.ce]", mortal), name)
    return Grid(folder)


NAMES = "plain once always"


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Grid:
    """What this machine makes of the grid; nobody dies."""
    made = grid(tmp_path_factory.mktemp("local") / "grid")
    with pytest.MonkeyPatch.context() as patch:
        here(patch)
        made.compare(NAMES).fine()
    return made


@pytest.fixture(scope="module")
def rayed(session: None, tmp_path_factory: pytest.TempPathFactory) -> tuple[Grid, Said]:
    """What the cluster makes of it, where one run's worker is killed once and another's each time."""
    made = grid(tmp_path_factory.mktemp("rayed") / "grid")
    (made.folder / "once.deaths").write_text("1")
    (made.folder / "always.deaths").write_text("9")
    return made, made.compare(NAMES, "--on", "ray")


def test_a_run_whose_worker_is_killed_each_time_is_named_and_the_others_are_those_of_the_local_pool(
    local: Grid, rayed: tuple[Grid, Said]
) -> None:
    made, said = rayed
    message = said.mistake()
    assert message.startswith("1 of 3 runs failed; the others are finished, and the same command goes on")
    assert "always seed 0: its process was ended from outside (out of memory, or killed), 2 times" in message
    lines = [line for line in said.out.splitlines() if not line.startswith("\x1b[33m(raylet)")]  # Ray's own notice
    assert sorted(line.partition(" (")[0] for line in lines) == [
        "done: once seed 0",
        "done: plain seed 0",
        "failed: always seed 0",
    ]
    ((process, epochs),) = made.died("once")
    assert 1 < epochs < EPOCHS
    assert not alive(process)
    first, second = made.died("always")
    assert first[0] != second[0]
    assert 1 < first[1] < second[1] < EPOCHS  # its second try went on where the first one was killed
    ours, theirs = made.runs(), local.runs()
    assert {"best.safetensors", "last.safetensors", "recipe.toml", "evaluation/outcomes.csv"} < theirs["plain"].keys()
    assert ours["plain"] == theirs["plain"]
    assert ours["once"] == theirs["once"]
    assert "evaluation/outcomes.csv" not in ours["always"]
    assert not list(made.folder.rglob(".*.tmp"))


def test_the_same_command_goes_on_with_a_half_done_grid(local: Grid, rayed: tuple[Grid, Said]) -> None:
    made, _ = rayed
    (made.folder / "always.deaths").unlink()
    before = {
        path: path.stat().st_mtime_ns for name in ("plain", "once") for path in made.folder.glob(f"out/{name}/*/*")
    }
    made.compare(NAMES, "--on", "ray", "--workers", "1").fine()
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert made.runs() == local.runs()
    assert Run.open(made.folder / "out/always/seed0").metrics["epoch"].tolist() == list(range(1, EPOCHS + 1))
    assert (made.folder / "out/report.html").exists()


@pytest.mark.parametrize(("gpus", "device"), [(0.0, "cpu"), (0.5, "auto")])
def test_what_the_machines_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gpus: float, device: str) -> None:
    """Paths that mean the same everywhere, and a GPU for those alone who asked for one."""
    told: list[Any] = []

    def each(*arguments: Any, **settings: Any) -> Iterator[tuple[int, None]]:
        told.extend([*arguments, settings])
        raise UnmovedError("enough")

    monkeypatch.setattr(ray_cluster, "each", each)
    monkeypatch.chdir(tmp_path)
    jobs = jobs_of([config.read(recipe(tmp_path))], [0, 1], Path("out"), (), threads=3)
    asked = Cluster(cpus=3, gpus=gpus)
    with pytest.raises(UnmovedError, match="enough"):
        compare.compare(jobs, cluster=asked)
    work, sent, count, _, settings = told
    assert (work.func, work.keywords) == (compare.work, {"device": device})
    folder = tmp_path / "out" / f"{tmp_path.name}-tiny"
    assert [job.path for job in sent] == [str(folder / "seed0"), str(folder / "seed1")]
    assert [replace(job, path="") for job in sent] == [replace(job, path="") for job in jobs]
    assert (count, settings) == (2, {"cluster": asked, "shared": folder})


def end_of(processes: list[int]) -> None:
    deadline = time.monotonic() + PATIENCE
    while any(map(alive, processes)) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not any(map(alive, processes))


# --- each


def test_only_the_job_whose_process_dies_is_tried_again_and_given_up_at_the_second_death(
    session: None, tmp_path: Path
) -> None:
    tasks = [Task(tmp_path / str(k), died) for k, died in enumerate([0, 9, 1])]
    tasks.append(Task(tmp_path / "error", error="its own"))
    polls: list[int] = []
    ended = dict(ray_cluster.each(act, tasks, 2, lambda: polls.append(1), cluster=Cluster(), shared=tmp_path))
    assert {number: type(error) for number, error in ended.items()} == {
        0: type(None),
        1: local_pool.ProcessDied,
        2: type(None),
        3: ray_cluster.JobError,
    }
    assert str(ended[3]) == "ValueError: its own"
    assert [len(task.tries()) for task in tasks] == [1, 2, 2, 1]
    assert polls
    assert ray.is_initialized()  # it was joined before


def test_what_failed_comes_back_in_the_same_words(session: None, tmp_path: Path) -> None:
    ((_, error),) = ray_cluster.each(mistaken, [tmp_path / "this"], 1, cluster=Cluster(), shared=tmp_path)
    assert type(error) is UnmovedError
    assert str(error) == "expected another path, came this"
    ((_, error),) = ray_cluster.each(failed, [tmp_path / "this"], 1, cluster=Cluster(), shared=tmp_path)
    assert type(error) is ray_cluster.JobError
    assert str(error) == f"OddError: odd (traceback in {tmp_path / 'this'})"


def test_a_job_works_in_the_folder_of_the_command_and_sees_no_gpu_that_it_did_not_ask_for(
    session: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    seen = tmp_path / "seen"
    assert list(ray_cluster.each(look, [seen], 1, cluster=Cluster(), shared=tmp_path)) == [(0, None)]
    assert seen.read_text().split("\n") == [str(tmp_path), ""]


def test_what_is_left_early_is_ended(session: None, tmp_path: Path) -> None:
    slow = Task(tmp_path / "slow", seconds=600.0)

    def leave() -> None:
        if slow.tries():
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        list(ray_cluster.each(act, [slow, Task(tmp_path / "never")], 1, leave, cluster=Cluster(), shared=tmp_path))
    (process,) = slow.tries()
    end_of([process])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["slow"]


# --- machines that are not fit


def refused(tmp_path: Path, asked: Cluster = Cluster()) -> str:  # noqa: B008
    tasks = [Task(tmp_path / "runs" / str(k)) for k in range(3)]
    with pytest.raises(UnmovedError) as caught:
        list(ray_cluster.each(act, tasks, 1, cluster=asked, shared=tmp_path / "runs"))
    assert not any(task.tries() for task in tasks)
    return str(caught.value)


def test_a_machine_that_does_not_see_the_folder(session: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_cluster, "PATIENCE", 0.2)
    monkeypatch.setattr(ray_cluster, "write_atomic", lambda *arguments: None)
    message = refused(tmp_path)
    assert message.startswith(f"{socket.gethostname()}: expected a machine that sees the folder of the runs")
    assert f"where {tmp_path / 'runs'} is missing or another one; choose an --out on a file system" in message


def test_a_machine_with_another_version(session: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    there = package.__version__
    monkeypatch.setattr(package, "__version__", "77.7", raising=False)
    words = f"expected unmoved 77.7 on every machine of the cluster, came: version {there} (with {sys.executable})"
    assert words in refused(tmp_path)


def test_a_machine_without_the_package(session: None, tmp_path: Path) -> None:
    (tmp_path / "unmoved.py").write_text("raise ImportError('No module named torch')")
    settings = {"runtime_env": {"env_vars": {"PYTHONPATH": str(tmp_path)}}}
    kind, words = ray.get(ray.remote(**settings)(ray_cluster._traveller()).remote("1.0", b"", ("", "", 0.0, 0.0)))
    assert kind == "unfit"
    assert "expected unmoved 1.0 on every machine of the cluster, came: No module named torch" in words


@pytest.mark.skipif(torch.cuda.is_available(), reason="PyTorch sees a GPU")
def test_a_machine_whose_pytorch_sees_no_gpu(session: None, tmp_path: Path) -> None:
    message = refused(tmp_path, Cluster(gpus=0.5))
    assert "expected a PyTorch that sees the 0.5 GPU(s) which Ray set aside for a run" in message


def test_a_run_too_large_for_every_machine(session: None, caplog: pytest.LogCaptureFixture) -> None:
    words = "expected a machine with 3 CPUs and 0 GPUs for a run, came 2 CPUs and 1 GPUs"
    with pytest.raises(UnmovedError, match=f"{words}; ask for less with --cpus-per-run"):
        ray_cluster._say_where_nothing_fits(ray, Cluster(cpus=3), started=True)
    ray_cluster._say_where_nothing_fits(ray, Cluster(cpus=3), started=False)  # others may join
    assert caplog.messages == [f"{words}; waiting until one joins the cluster"]
    ray_cluster._say_where_nothing_fits(ray, Cluster(cpus=2, gpus=1), started=True)
    assert len(caplog.messages) == 1


# --- the command


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--on", "rays"], "--on: unknown value 'rays'; did you mean 'ray'?"),
        (["--cpus-per-run", "2"], "--ray-address, --cpus-per-run and --gpus-per-run say how --on ray works"),
        (["--on", "ray", "--gpus-per-run", "1.5"], "--gpus-per-run: expected a share of one GPU or a whole number"),
        (["--on", "ray", "--ray-address", "ray://there:1"], "expected host:port, auto or local, came 'ray://there:1'"),
    ],
)
def test_options_that_cannot_be_meant(tmp_path: Path, options: list[str], words: str) -> None:
    assert words in unmoved("compare", recipe(tmp_path), "--out", tmp_path / "out", *options).mistake()
    assert not (tmp_path / "out").exists()


def test_where_ray_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    message = unmoved("compare", recipe(tmp_path), "--out", tmp_path / "out", "--on", "ray").mistake()
    assert message == "--on ray needs the extra: pip install 'unmoved[ray]'"
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("way", ["option", "environment"])
def test_where_no_cluster_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    """Ray itself would try for minutes, and then end the process."""
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))  # nobody listens
        address = f"127.0.0.1:{free.getsockname()[1]}"
        options = ["--ray-address", address] if way == "option" else []
        monkeypatch.setenv("RAY_ADDRESS", "there:1" if options else address)
        said = unmoved("compare", recipe(tmp_path), "--out", tmp_path / "out", "--on", "ray", *options)
    assert f"expected a Ray cluster at {address}, came no answer" in said.mistake()


@pytest.mark.parametrize("fails", [False, True])
def test_rays_workers_do_not_look_for_modules_in_the_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: bool
) -> None:
    """They look first in the folder where Ray was started, before the standard library."""
    places: list[Path] = []

    def init(**settings: Any) -> None:
        places.append(Path.cwd())
        if fails:
            raise RuntimeError("no room")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ray, "init", init)
    with pytest.raises(UnmovedError, match="no room") if fails else nullcontext():
        ray_cluster._connect(ray, "local")
    assert places == [Path(tmp_path.anchor)]
    assert Path.cwd() == tmp_path
