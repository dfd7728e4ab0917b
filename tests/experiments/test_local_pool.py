"""Jobs in processes that die: whose fault it was is known, and the others do not suffer."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import pytest
from helpers.deadly_jobs import Task, act, alive

from unmoved.experiments import local_pool

if not hasattr(os, "fork"):
    pytest.skip("these tests kill", allow_module_level=True)


def test_only_the_job_whose_process_dies_is_tried_again_and_given_up_at_the_second_death(tmp_path: Path) -> None:
    deaths = [0, 9, 0, 1, 0, 0]
    tasks = [Task(tmp_path / str(k), died, seconds=0.02) for k, died in enumerate(deaths)]
    tasks.append(Task(tmp_path / "error", error="its own"))
    polls: list[int] = []
    ended = dict(local_pool.each(act, tasks, 2, lambda: polls.append(1)))
    assert {number: type(error) for number, error in ended.items()} == {
        **dict.fromkeys((0, 2, 3, 4, 5), type(None)),
        1: local_pool.ProcessDied,
        6: ValueError,
    }
    assert str(ended[6]) == "its own"
    assert [len(task.tries()) for task in tasks] == [1, 2, 1, 2, 1, 1, 1]
    assert polls


def test_a_process_that_dies_between_two_jobs_costs_nothing(tmp_path: Path) -> None:
    tasks, killed = [Task(tmp_path / str(k)) for k in range(4)], []
    with closing(local_pool.each(act, tasks, 1)) as ended:
        for number, error in ended:
            assert error is None
            if len(killed) < 2:
                killed.append(tasks[number].tries()[-1])
                os.kill(killed[-1], signal.SIGKILL)
                time.sleep(0.5 * (len(killed) - 1))  # before it is noticed, and after
    assert all(task.tries() for task in tasks)
    assert len(set(killed)) == 2


@pytest.mark.parametrize("how", ["SIGKILL", "SIGINT"])
def test_when_the_parent_alone_is_killed_or_interrupted_its_processes_end(tmp_path: Path, how: str) -> None:
    """Interrupted, as by a scheduler; Ctrl-C in a terminal reaches all of them."""
    code = (
        "import signal, sys\nfrom pathlib import Path\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # what started the tests may ignore it
        "from helpers import deadly_jobs\nfrom unmoved.experiments import local_pool\n"
        "if __name__ == '__main__':\n"
        "    tasks = [deadly_jobs.Task(Path(name), seconds=600.0) for name in sys.argv[1:]]\n"
        "    list(local_pool.each(deadly_jobs.act, tasks, 2))\n"
    )
    script, tasks = tmp_path / "script.py", [Task(tmp_path / "a"), Task(tmp_path / "b")]
    script.write_text(code)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), *sys.path])}
    command = [sys.executable, str(script), *(str(task.path) for task in tasks)]
    process, deadline = subprocess.Popen(command, env=environment), time.monotonic() + 60
    try:
        while not all(task.tries() for task in tasks) and time.monotonic() < deadline:
            time.sleep(0.02)
        children = [task.tries()[0] for task in tasks]
        assert all(map(alive, children))
    finally:
        process.send_signal(signal.Signals[how])
        try:
            process.wait(timeout=60)
        finally:
            process.kill()
    deadline = time.monotonic() + 60
    while any(map(alive, children)) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not any(map(alive, children))


def test_no_module_of_the_current_folder_runs_in_place_of_an_installed_one(tmp_path: Path) -> None:
    """Processes look for modules where their parent does: not in the folder that it was started from."""
    script, folder, mark = tmp_path / "script.py", tmp_path / "elsewhere", tmp_path / "mark"
    folder.mkdir()
    for name in sys.stdlib_module_names | {"numpy", "torch", "unmoved"}:
        (folder / f"{name}.py").write_text(f"open({str(mark)!r}, 'a').write({name!r} + ' ')\n")
    script.write_text(
        "import os, sys\nfrom unmoved.experiments import local_pool\n"
        "def look(path):\n    with open(path, 'w') as file: file.write(repr(sys.path))\n"
        "if __name__ == '__main__':\n"
        "    (ended,) = local_pool.each(look, sys.argv[1:], 1)\n"
        "    assert ended == (0, None), ended\n"
        "    assert open(sys.argv[1]).read() == repr(sys.path)\n"
        "    assert 'PYTHONSAFEPATH' not in os.environ\n"
    )
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONSAFEPATH"}
    command = [sys.executable, str(script), str(tmp_path / "path")]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr, mark.exists()) == (0, "", False), mark.read_text() if mark.exists() else ""
