"""Run the command `unmoved`. Every mistake of a user ends in one message and exit code 1, a wrong command line in 2."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from unmoved.cli import export_command, grid_commands, info_commands, judge_command, run_commands, screen
from unmoved.cli.options import app

__all__ = ["app", "main", "export_command", "grid_commands", "info_commands", "judge_command", "run_commands"]

KEPT = "what is done is kept; this goes on from there"
# The commands in the order of the help, and what to do after an interruption of each.
INTERRUPTED = {
    "demo": KEPT,
    "compare": KEPT,
    "train": "what was saved is intact; this goes on after the last saved epoch",
    "evaluate": KEPT,
    "doctor": "nothing was changed; this asks the doctor again",
    "analyze": KEPT,
    "report": "no report was written; this draws it",
    "judge": KEPT,
    "export": "an export is written whole or not at all; this writes it",
    "show": "this shows it again",
    "list": "this shows it again",
}
UNDER_TORCHRUN = "TORCHELASTIC_RUN_ID"  # a variable that torchrun sets
_ORDER = {name: number for number, name in enumerate(INTERRUPTED)}
app.registered_commands.sort(key=lambda command: _ORDER[command.name or str(getattr(command.callback, "__name__", ""))])


def main() -> None:
    """Run the command; errors that a user can cause become one message on standard error and exit code 1."""
    from unmoved.core.errors import UnmovedError

    screen.speak_any_language()
    try:
        app()
    except (UnmovedError, OSError) as error:
        words = f"{error.filename}: {error.strerror}" if isinstance(error, OSError) and error.filename else error
        screen.say(f"error: {words}", style="red", error=True)
        sys.exit(1)
    except SystemExit as end:
        # 130 is typer's answer to Ctrl-C, which says nothing; of the processes of torchrun the first one speaks.
        if end.code == 130 and not (UNDER_TORCHRUN in os.environ and os.environ.get("RANK", "0") != "0"):
            screen.say(f"interrupted; {how_to_go_on(sys.argv[1:])}", error=True)
        raise


def how_to_go_on(words: Sequence[str]) -> str:
    """Return what an interrupted command has left, and the command line that goes on."""
    command = next((word for word in words if not word.startswith("-")), "")
    advice, words = INTERRUPTED.get(command, "to begin anew"), list(words)
    if command == "train" and not _is_begun(words):
        advice = "nothing was saved yet; this begins anew"
    elif command == "train" and "--resume" not in words:
        words.append("--resume")
    return f"{advice}:\n  {shlex.join([*_program(), *words])}"


def _program() -> list[str]:
    """Return what this command was started by: ``unmoved``, or ``torchrun``, as the environment tells."""
    if UNDER_TORCHRUN not in os.environ:
        return ["unmoved"]
    here, world = (int(os.environ.get(name, "1")) for name in ("LOCAL_WORLD_SIZE", "WORLD_SIZE"))
    # How several machines find each other stands in no variable.
    nodes = ["--nnodes", str(world // here), "..."] if world > here else []
    return ["torchrun", "--nproc-per-node", str(here), *nodes, "-m", "unmoved"]


def _is_begun(words: Sequence[str]) -> bool:
    """Return whether anything was saved in the run folder that a command line of train names."""
    from unmoved.runs import records  # without torch, whose import may be what was interrupted: it bears no second try

    out = [right for left, right in pairwise(words) if left == "--out"]
    out += [word.removeprefix("--out=") for word in words if word.startswith("--out=")]
    return any(records.is_begun(Path(path)) for path in out)
