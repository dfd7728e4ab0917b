"""Define the commands that change nothing: show, list."""

from __future__ import annotations

import inspect
import json
import sys
from pathlib import Path
from typing import Annotated

import tomli_w
import typer

from unmoved.cli import screen
from unmoved.cli.options import Overrides, app


@app.command()
def show(
    recipe: Annotated[Path | None, typer.Argument(metavar="[RECIPE]", help="The recipe to resolve.")] = None,
    overrides: Overrides = [],  # noqa: B006
    schema: Annotated[bool, typer.Option("--schema", help="Print the JSON schema of recipes instead.")] = False,
) -> None:
    """Print a recipe fully resolved, as TOML that can be trained; or the JSON schema that editors complete from."""
    from unmoved.core import errors
    from unmoved.runs import recipe as config

    if schema:
        sys.stdout.write(json.dumps(config.Recipe.model_json_schema(), indent=2) + "\n")
    elif recipe is None:
        raise errors.UnmovedError("show: expected a recipe file or --schema, came neither")
    else:
        sys.stdout.write(tomli_w.dumps(config.read(recipe, overrides).tables()))


@app.command("list")
def list_() -> None:
    """Everything a recipe can name: terms, attacks, defenses, models, data; and the recipes in this folder."""
    from unmoved.core.errors import UnmovedError
    from unmoved.core.untrusted import regular
    from unmoved.runs import components, shipped

    for kind, members in components.KINDS.items():
        screen.say(kind, style="bold")
        for name, factory in sorted(members.items()):
            summary = (inspect.getdoc(factory) or "").split("\n")[0]
            screen.say(f"  {name:24} {summary}")
    screen.say("recipes", style="bold")
    files = {name: shipped.located(Path(name)) for name in shipped.names()}
    files |= {str(path): path for path in sorted(Path("recipes").glob("*/*.toml"))}
    for name, path in files.items():
        try:
            with regular(path) as file:
                first = file.readline(200).decode(errors="replace").removeprefix("#").strip()
        except (OSError, UnmovedError):
            continue
        screen.say(f"  {name:24} {first}")
