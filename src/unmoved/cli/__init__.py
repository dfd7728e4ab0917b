"""Run the command `unmoved`. Every mistake of a user ends in one message and exit code 1, a wrong command line in 2."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from itertools import pairwise

from unmoved.cli import export_command, grid_commands, info_commands, judge_command, run_commands, screen
from unmoved.cli.options import app

__all__ = ["app", "main", "export_command", "grid_commands", "info_commands", "judge_command", "run_commands"]


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
        if end.code == 130:  # typer's answer to Ctrl-C, which says nothing
            screen.say(f"interrupted; {_how_to_go_on(sys.argv[1:])}", error=True)
        raise


def _how_to_go_on(words: Sequence[str]) -> str:
    command = next((word for word in words if not word.startswith("-")), "")
    if command in ("evaluate", "judge", "compare", "analyze"):
        return "what is done is kept: the same command goes on from there"
    if command != "train":
        return "the same command begins anew"
    from unmoved.runs.folder import Run

    out = [right for left, right in pairwise(words) if left == "--out"]
    out += [word.removeprefix("--out=") for word in words if word.startswith("--out=")]
    if any(Run(path).is_begun() for path in out):
        return "what was saved is intact: the same command with --resume goes on after the last saved epoch"
    return "nothing was saved yet: the same command begins anew"
