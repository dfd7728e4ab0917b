"""One writer at a time in a run folder: the second is refused, and a killed one leaves nothing that blocks."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from helpers.cli import RECIPES, digests, recipe, unmoved
from helpers.fork_server import Nursery

from unmoved.core import files
from unmoved.core.errors import UnmovedError
from unmoved.experiments import compare
from unmoved.experiments.jobs import jobs_of
from unmoved.runs import lock
from unmoved.runs import recipe as config
from unmoved.runs.folder import Run

if not hasattr(os, "fork"):
    pytest.skip("these tests fork", allow_module_level=True)

REFUSED = "another process trains or evaluates this run"
HOLDER = """
import sys, time
from pathlib import Path
from unmoved.runs.lock import alone
with alone(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(120)
"""


@contextlib.contextmanager
def held(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process holds the folder's lock; it is killed at the end, the hard way."""
    process = subprocess.Popen([sys.executable, "-c", HOLDER, str(folder)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == "held\n"
        yield process
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait(timeout=60)
        process.stdout.close()


@pytest.fixture(scope="module")
def nursery(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nursery]:
    nursery = Nursery(tmp_path_factory.mktemp("nursery") / "errors")
    yield nursery
    nursery.close()


def test_while_a_process_holds_a_run_nobody_else_trains_or_evaluates_it(tmp_path: Path) -> None:
    path, run = recipe(tmp_path), tmp_path / "run"
    train = ("train", path, "--out", run, "--set", "training.epochs=1")
    with held(run):  # a folder that is not begun yet
        assert REFUSED in unmoved(*train).mistake()
        assert {file.name for file in run.iterdir()} == {lock.NAME}
    assert (run / lock.NAME).exists(), "it was killed"
    unmoved(*train).fine()
    assert not (run / lock.NAME).exists()
    unmoved("evaluate", run, "--no-doctor").fine()
    before = digests(run)
    with held(run):
        for command in (train, (*train, "--resume"), ("evaluate", run)):
            said = unmoved(*command).mistake()
            assert said.startswith(f"{run}: {REFUSED}")
            assert "\n" not in said
        (job,) = jobs_of([config.read(path, ["training.epochs=1"])], [0], tmp_path / "out", (), 0)
        with held(Path(job.path)), pytest.raises(UnmovedError, match=REFUSED):
            compare.work(job)
        unmoved("doctor", run, "--n", 5).fine()
        unmoved("analyze", "softmax", run, "--n", 10, "--out", tmp_path / "analysis").fine()
        unmoved("report", run, "--out", tmp_path / "r.html").fine()
        assert {name: digest for name, digest in digests(run).items() if name in before} == before
    unmoved(*train, "--resume").fine()


def test_a_training_in_progress_is_not_disturbed_by_a_second_or_by_those_who_look(
    nursery: Nursery, tmp_path: Path
) -> None:
    path, run = RECIPES / "digits" / "trades_awp.toml", tmp_path / "run"
    small = ["training.epochs=6", "model.width=4", "data.test=1500", "attack.steps=1", "training.checkpoint_share=1"]
    command = ["train", path, *(part for change in small for part in ("--set", change)), "--resume", "--out"]
    unmoved(*command, tmp_path / "uncut").fine()
    with ThreadPoolExecutor(1) as threads:
        first = threads.submit(nursery.run, *command, run)
        deadline = time.monotonic() + 120
        while not (run / "trainer.pt").exists() and time.monotonic() < deadline:
            time.sleep(0.002)
        for second in ((*command, run), ("evaluate", run)):
            assert REFUSED in unmoved(*second).mistake()
        unmoved("analyze", "softmax", run, "--n", 10, "--out", tmp_path / "analysis").fine()
        assert first.result(timeout=120) == 0
    for name in ("best.safetensors", "last.safetensors"):
        assert (run / name).read_bytes() == (tmp_path / "uncut" / name).read_bytes()
    assert nursery.errors.read_text() == ""


def test_the_same_thread_enters_again_and_another_does_not(tmp_path: Path) -> None:
    refused: list[UnmovedError] = []

    def enter() -> None:
        try:
            with lock.alone(tmp_path):
                pass
        except UnmovedError as error:
            refused.append(error)

    with lock.alone(tmp_path):
        with lock.alone(tmp_path / "." / "x" / ".."):
            pass
        other = threading.Thread(target=enter)
        other.start()
        other.join()
        assert len(refused) == 1, "leaving the inner one did not open the outer one"
    enter()
    assert len(refused) == 1


def test_of_many_processes_at_a_time_one_is_in(tmp_path: Path) -> None:
    """Locks that are taken and given back all the time, the file with its name coming and going."""
    code = (
        "import os, sys\nfrom pathlib import Path\nfrom unmoved.core.errors import UnmovedError\n"
        "from unmoved.runs.lock import alone\nfolder, entered = Path(sys.argv[1]), 0\n"
        "while entered < 300:\n    try:\n        with alone(folder):\n"
        "            os.close(os.open(folder / 'inside', os.O_CREAT | os.O_EXCL))\n"
        "            os.unlink(folder / 'inside')\n            entered += 1\n"
        "    except UnmovedError:\n        pass\n"
    )
    processes = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path)]) for _ in range(4)]
    assert [process.wait(timeout=120) for process in processes] == [0] * 4
    assert list(tmp_path.iterdir()) == []


def test_a_file_system_without_locks_is_trained_on_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unsupported(descriptor: int) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(lock, "_take", unsupported)
    with lock.alone(tmp_path):
        pass


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UnmovedError, match=r"could not write .*file.run"), lock.alone(tmp_path / "file" / "run"):
        pass


# --- what killed processes leave


def test_what_a_killed_process_left_half_written_is_cleared_away_and_nothing_else(tmp_path: Path) -> None:
    path, run = recipe(tmp_path), tmp_path / "run"
    train = ("train", path, "--out", run, "--set", "training.epochs=1", "--resume")
    unmoved(*train).fine()
    digits, hour = "0123456789abcdef" * 2, time.time() - 3700
    stale = [f".{name}.{digits}.tmp" for name in ("trainer.pt", "best.safetensors", "metrics.jsonl")]
    stale += [f"{kind}/.outcomes.csv.{digits}.tmp" for kind in ("evaluation", "verdict", "validation")]
    stale += [f"verdict/adversarial/.fab-t-00000000.npz.{digits}.tmp"]
    old = [f".doctor.json.{digits}.tmp", f"analysis/.softmax-0123.json.{digits}.tmp"]
    theirs = ["notes.tmp", ".x.tmp", f".x.{digits[1:]}.tmp", f"x.{digits}.tmp", f".x.{digits}.tmp.gz", f".{digits}.tmp"]
    for name in (*stale, *old, *theirs):
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_bytes(b"half")
    unmoved(*train).fine()
    there = digests(run).keys()
    assert there.isdisjoint(stale)
    assert there >= {*old, *theirs}, "a doctor or an analysis may be writing right now"
    for name in old:
        os.utime(run / name, (hour, hour))
    (run / stale[0]).write_bytes(b"half")
    unmoved("evaluate", run, "--no-doctor").fine()
    there = digests(run).keys()
    assert there.isdisjoint([*stale, *old])
    assert there >= set(theirs)


def test_nothing_is_cleared_away_where_another_process_is_at_work(tmp_path: Path) -> None:
    half = tmp_path / f".trainer.pt.{'a' * 32}.tmp"
    half.write_bytes(b"half")
    with held(tmp_path):
        with pytest.raises(UnmovedError, match=REFUSED), Run(tmp_path).alone():
            pass
        assert half.exists()
    with Run(tmp_path).alone():
        assert not half.exists()


def test_a_write_that_is_killed_leaves_a_name_that_is_cleared_away(tmp_path: Path) -> None:
    """The names are those that write_atomic really uses."""
    code = (
        "import os, signal, sys\nfrom pathlib import Path\nfrom unmoved.core import files\n"
        "files.os.replace = lambda *names: os.kill(os.getpid(), signal.SIGKILL)\n"
        "files.write_atomic(Path(sys.argv[1]) / 'last.safetensors', b'new')\n"
    )
    (tmp_path / "last.safetensors").write_bytes(b"old")
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path)]).returncode == -signal.SIGKILL
    assert len(list(tmp_path.iterdir())) == 2
    files.remove_leftovers(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["last.safetensors"]
    assert (tmp_path / "last.safetensors").read_bytes() == b"old"
