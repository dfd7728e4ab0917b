"""What the tests of the road share: a recipe that trains in a blink, and the command called in this process."""

from __future__ import annotations

import contextlib
import hashlib
import io
import sys
from dataclasses import dataclass
from pathlib import Path

from unmoved.cli import main

ROOT = Path(__file__).resolve().parents[1]

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
