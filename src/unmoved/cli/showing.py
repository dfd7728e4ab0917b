"""Commands that only look: show, list."""

from __future__ import annotations

import inspect
import json
import sys
from pathlib import Path
from typing import Annotated

import tomli_w
import typer

from unmoved.cli.options import Overrides, app, console
from unmoved.screen import plain


@app.command()
def show(
    recipe: Annotated[Path | None, typer.Argument(metavar="[RECIPE]", help="The recipe to resolve.")] = None,
    overrides: Overrides = [],  # noqa: B006
    schema: Annotated[bool, typer.Option("--schema", help="Print the JSON schema of recipes instead.")] = False,
) -> None:
    """Print a recipe fully resolved, as TOML that can be trained; or the JSON schema that editors complete from."""
    from unmoved import config, errors

    if schema:
        sys.stdout.write(json.dumps(config.Recipe.model_json_schema(), indent=2) + "\n")
    elif recipe is None:
        raise errors.UnmovedError("show: expected a recipe file or --schema, came neither")
    else:
        sys.stdout.write(tomli_w.dumps(config.read(recipe, overrides).tables()))


@app.command("list")
def list_() -> None:
    """Everything a recipe can name: terms, attacks, defenses, models, data; and the recipes in this folder."""
    from unmoved import components
    from unmoved.errors import UnmovedError
    from unmoved.reading import regular

    for kind, members in components.KINDS.items():
        console.print(f"[bold]{kind}[/bold]")
        for name, factory in sorted(members.items()):
            summary = (inspect.getdoc(factory) or "").split("\n")[0]
            console.print(f"  {name:24} {summary}", markup=False, highlight=False, soft_wrap=True)
    console.print("[bold]recipes[/bold]")
    for path in sorted(Path("recipes").glob("*/*.toml")):
        try:
            with regular(path) as file:
                first = file.readline(200).decode(errors="replace").removeprefix("#").strip()
        except (OSError, UnmovedError):
            continue
        console.print(f"  {plain(str(path)):40} {plain(first)}", markup=False, highlight=False, soft_wrap=True)
