"""What the tests of the road share: a recipe that trains in a blink, the command and its pool in this process."""

from __future__ import annotations

import contextlib
import hashlib
import io
import sys
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from unmoved.cli import main
from unmoved.experiments import local_pool
from unmoved.experiments.jobs import Job
from unmoved.runs.folder import Run

ROOT = Path(__file__).resolve().parents[2]
RECIPES = ROOT / "src" / "unmoved" / "recipes"

RECIPE = """
[data]
use = "digits"
test = 1500

[model]
use = "mlp"
hidden = [16]

[threat]
norm = "linf"
eps = 0.1

[training]
epochs = 2
batch_size = 64
precision = "float32"
checkpoint_share = 1.0

[optimizer]
use = "adam"
lr = 0.01

[attack]
use = "pgd"
steps = 2

[objective.ce]

[validation]
use = "pgd"
steps = 2
keep = "best"

[evaluation]
n = 30

[evaluation.attacks.pgd]
use = "pgd"
steps = 2
keep = "best"
"""

# Every table and every kind of value that a recipe may have.
EVERYTHING = """
name = "all"
base = "at"
[data]
use = "arrays"
path = "x.npz"
layout = "NCHW"
test = 0.25
[model]
use = "mlp"
hidden = [4]
mean = [0.5]
std = [0.25]
[threat]
norm = "l2"
eps = "8/255"
[training]
epochs = 4
part = { of = 2, number = 1 }
augment = "crop-flip"
[optimizer]
use = "adam"
lr = 0.01
[schedule]
use = "multi_step"
milestones = [1, 2]
[attack]
use = "pgd"
eps = { from = 0.0, to = "25/255", over = 0.5 }
step_size = { from = 0.1, to = 0.01 }
stop = { use = "friendly", tau = 2 }
loss = { use = "kl" }
[objective.kl]
weight = { from = 0.0, to = 6.0 }
[objective.mine]
use = "my_lab.losses:Entropy"
weight = 0.5
anything = [1, "two", { three = 3.5 }]
[[phases]]
from_epoch = 1
attack = "none"
defense = { use = "awp", gamma = { from = 0.0, to = 0.01 } }
objective = { ce = { label_smoothing = 0.1 } }
[[phases]]
from_epoch = 2
attack = { use = "apgd" }
[validation]
use = "apgd"
[evaluation]
n = 3
[evaluation.attacks.square]
use = "square"
[evaluation.attacks.fab]
use = "fab"
"""


def recipe(folder: Path, text: str = RECIPE, name: str = "tiny") -> Path:
    """The text as ``folder/tiny.toml``."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.toml"
    path.write_text(text)
    return path


@dataclass(frozen=True)
class Said:
    """What a command left behind: its exit code and what it wrote."""

    code: int
    out: str
    err: str

    def mistake(self) -> str:
        """The one message of a user's mistake; fails where it is none, or more than one, or a traceback."""
        assert self.code == 1, (self.code, self.out, self.err)
        assert self.err.startswith("error: "), self.err
        assert self.err.count("error: ") == 1, self.err
        assert "Traceback" not in self.err + self.out
        return self.err.removeprefix("error: ").rstrip()

    def fine(self) -> Said:
        assert self.code == 0, (self.code, self.out, self.err)
        return self


def unmoved(*arguments: object) -> Said:
    """The command, in this process, as its entry point runs it; whatever it lets through is raised here."""
    out, err, argv, code = io.StringIO(), io.StringIO(), sys.argv, 0
    sys.argv = ["unmoved", *map(str, arguments)]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            main()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
    finally:
        sys.argv = argv
    return Said(code, out.getvalue(), err.getvalue())


def digests(folder: Path) -> dict[str, str]:
    """The sha256 of every file below a folder."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


class Inline:
    """A pool that works in this process; a job of a recipe named so "is killed"."""

    def __init__(self, *arguments: object, **settings: object) -> None:
        pass

    def submit(self, act: Callable[[Job], str], job: Job) -> Future[str]:
        future: Future[str] = Future()
        try:
            if job.label.startswith("killed"):
                raise BrokenProcessPool
            future.set_result(act(job))
        except Exception as error:
            future.set_exception(error)
        return future

    def shutdown(self, **settings: object) -> None:
        pass


def here(patch: pytest.MonkeyPatch) -> None:
    """Jobs are done in this process, which keeps its one thread: where the processes are not what is tested."""
    patch.setattr(local_pool, "ProcessPoolExecutor", Inline)
    patch.setattr("torch.set_num_threads", lambda count: None)


def interrupted(path: Path, run: Path, saves: int) -> None:
    """Train a recipe until its state has been saved so many times, and press Ctrl-C then."""
    real, saved = Run.save_state, []

    def save_state(run: Run, state: dict[str, Any]) -> None:
        real(run, state)
        saved.append(run)
        if len(saved) == saves:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "save_state", save_state)
        assert unmoved("train", path, "--out", run).code == 130
