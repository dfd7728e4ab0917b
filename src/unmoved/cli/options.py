"""Define the command-line application, and the options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

# In help texts a square bracket is markup; a backslash before it makes it a bracket.
app = typer.Typer(
    help="Train image classifiers that small worst-case perturbations do not move, and measure how far that is true.",
    epilog="Start with: unmoved compare recipes/digits/standard.toml recipes/digits/at.toml",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
RecipePath = Annotated[Path, typer.Argument(metavar="RECIPE", help="A recipe, such as recipes/digits/at.toml.")]
RunPath = Annotated[Path, typer.Argument(metavar="RUN", help="A run folder made by 'unmoved train'.")]
Overrides = Annotated[
    list[str],
    typer.Option("--set", metavar="A.B=VALUE", help="Change a key of the recipe, such as training.epochs=5. Repeats."),
]
Allow = Annotated[
    list[str],
    typer.Option("--allow", metavar="PACKAGE", help="Let recipes import this package of yours. Repeats."),
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or mps.")]
