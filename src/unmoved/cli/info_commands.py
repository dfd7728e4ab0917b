"""Define the commands that change nothing: show, list."""

from __future__ import annotations

import inspect
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tomli_w
import typer

from unmoved.cli import screen
from unmoved.cli.options import Overrides, app, complete_recipe

if TYPE_CHECKING:
    from unmoved.core.untrusted import Json

# What is a share of the samples, or a count of them: read as a float either way.
SHARES_OR_COUNTS = (("training", "validation"), ("data", "test"))


@app.command()
def show(
    name: Annotated[
        Path | None,
        typer.Argument(
            metavar="NAME",
            autocompletion=complete_recipe,
            help="A recipe, such as digits/at or a file; or a part, such as pgd.",
        ),
    ] = None,
    overrides: Overrides = [],  # noqa: B006
    schema: Annotated[bool, typer.Option("--schema", help="Print the JSON schema of recipes instead.")] = False,
) -> None:
    """Print a recipe in full, or what a part is and can be set to.

    A recipe is printed with every default filled in, as TOML that can be trained: unmoved show digits/at > mine.toml
    """
    from unmoved.core import errors
    from unmoved.runs import packaged_recipes
    from unmoved.runs import recipe as config

    if schema:
        sys.stdout.write(json.dumps(config.Recipe.model_json_schema(), indent=2) + "\n")
        return
    if name is None:
        raise errors.UnmovedError("show: expected a recipe, the name of a part or --schema, came none")
    file = packaged_recipes.located(name)
    kinds = {} if file.exists() else _kinds()
    if parts := {kind: members[str(name)] for kind, members in kinds.items() if str(name) in members}:
        from unmoved.cli.part_description import described

        if overrides:
            raise errors.UnmovedError(f"--set: {name} is no recipe, whose keys could be changed")
        screen.say("\n\n".join(described(kind, str(name), part) for kind, part in parts.items()))
        return
    tables = config.read(name, overrides).tables()
    if file != name and tables["name"] == name.as_posix():
        del tables["name"]  # a copy is called by its own file
    words = str(tables.pop("description", ""))
    sys.stdout.writelines(f"# {line}".rstrip() + "\n" for line in words.splitlines())
    _write_counts_whole(tables)
    sys.stdout.write(tomli_w.dumps(tables))


def _write_counts_whole(tables: Json) -> None:
    """Make counts of samples whole numbers, as a recipe writes them; run folders keep what decides their digests."""
    for name, key in SHARES_OR_COUNTS:
        table = tables.get(name)
        if isinstance(table, dict) and isinstance(size := table.get(key), float) and size > 1 and size.is_integer():
            table[key] = int(size)


@app.command("list")
def list_(
    kind: Annotated[str | None, typer.Argument(metavar="KIND", help="Only these, such as attacks or recipes.")] = None,
) -> None:
    """List what there is: parts of recipes, analyses, recipes. 'unmoved show' says more of each."""
    from unmoved.core.errors import require_choice

    kinds = {name: {key: _summary(part) for key, part in members.items()} for name, members in _kinds().items()}
    kinds["recipes"] = _recipes()
    if kind is not None:
        require_choice("list", kind, kinds)
    for name, members in kinds.items():
        if kind in (None, name):
            screen.say(name, style="bold")
            screen.say_each(members)


def _kinds() -> dict[str, Mapping[str, object]]:
    """Return the parts by kind and name: those that recipes can name, and analyses."""
    from unmoved.analyses.studies import STUDIES
    from unmoved.runs.components import KINDS

    return {**KINDS, "analyses": STUDIES}


def _summary(part: object) -> str:
    return (inspect.getdoc(part) or "").split("\n")[0]


def _recipes() -> dict[str, str]:
    """Return the first line of each recipe of the package, and of those in the folder ``recipes`` here."""
    from unmoved.core.errors import UnmovedError
    from unmoved.core.untrusted import regular
    from unmoved.runs import packaged_recipes

    files = {name: packaged_recipes.located(Path(name)) for name in packaged_recipes.names()}
    files |= {str(path): path for path in sorted(Path("recipes").glob("*/*.toml"))}
    lines: dict[str, str] = {}
    for name, path in files.items():
        try:
            with regular(path) as file:
                lines[name] = file.readline(200).decode(errors="replace").removeprefix("#").strip()
        except (OSError, UnmovedError):
            continue
    return lines
