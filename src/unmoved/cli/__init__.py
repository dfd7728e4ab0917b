"""The command `unmoved`. Every mistake of a user ends in one message and exit code 1; 2 is a wrong command line."""

from __future__ import annotations

import sys

from unmoved import screen
from unmoved.cli import one, several, showing
from unmoved.cli.options import app

__all__ = ["app", "main", "one", "several", "showing"]


def main() -> None:
    """The entry point: errors that a user can cause become one message on standard error and exit code 1."""
    from unmoved.errors import UnmovedError

    screen.speak_any_language()
    try:
        app()
    except (UnmovedError, OSError) as error:
        words = f"{error.filename}: {error.strerror}" if isinstance(error, OSError) and error.filename else error
        screen.say(f"error: {words}", style="red", error=True)
        sys.exit(1)
    except SystemExit as end:
        if end.code == 130:  # typer's answer to Ctrl-C, which says nothing
            screen.say("interrupted; what was saved is intact, --resume goes on from there", error=True)
        raise
