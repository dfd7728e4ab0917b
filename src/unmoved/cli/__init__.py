"""The command `unmoved`. Every mistake of a user ends in one message and exit code 1; 2 is a wrong command line."""

from __future__ import annotations

import sys

from rich.console import Console

from unmoved.cli import one, several, showing
from unmoved.cli.options import app
from unmoved.screen import plain

__all__ = ["app", "main", "one", "several", "showing"]


def main() -> None:
    """The entry point: errors that a user can cause become one message on standard error and exit code 1."""
    from unmoved.errors import UnmovedError

    said = Console(stderr=True)
    try:
        app()
    except (UnmovedError, OSError) as error:
        words = f"{error.filename}: {error.strerror}" if isinstance(error, OSError) and error.filename else error
        said.print(f"error: {plain(str(words))}", style="red", markup=False, highlight=False, soft_wrap=True)
        sys.exit(1)
    except SystemExit as end:
        if end.code == 130:  # typer's answer to Ctrl-C, which says nothing
            said.print("interrupted; what was saved is intact, --resume goes on from there", soft_wrap=True)
        raise
