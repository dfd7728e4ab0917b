"""Define the command-line application, and the options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

# In help texts a square bracket is markup; a backslash before it makes it a bracket.
app = typer.Typer(
    help="Train image classifiers that small worst-case perturbations do not move, and measure how far that is true.",
    epilog="Start with: unmoved compare digits/standard digits/at",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
RecipePath = Annotated[
    Path,
    typer.Argument(metavar="RECIPE", help="A recipe: a file, or one that comes with the package, such as digits/at."),
]
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
Attacks = Annotated[
    str,
    typer.Option(
        help="recipe, quick, standard or rand (AutoAttack), or attacks by name, such as pgd(steps=100),my_lab:Mine; "
        "commas between."
    ),
]
Number = Annotated[int | None, typer.Option("--n", min=1, help="Images to judge; all unless this or the recipe says.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Images a pass; the verdict does not depend on it.")]
AskDoctor = Annotated[bool, typer.Option("--doctor/--no-doctor", help="Ask the doctor too whether to believe it.")]
