"""Define the command-line application, and the options that several commands share."""

from __future__ import annotations

import glob
import os
from pathlib import Path
from typing import Annotated

import typer

from unmoved.cli import screen

app = typer.Typer(
    help="Train image classifiers that small worst-case perturbations do not move, and measure how far that is true.",
    epilog="Start with: unmoved demo",
    no_args_is_help=True,
    rich_markup_mode=None,  # it takes square brackets in help texts for markup
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(is_asked: bool) -> None:
    if is_asked:
        import unmoved

        screen.say(f"unmoved {unmoved.__version__}")
        raise typer.Exit


@app.callback()
def _before_any_command(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_version, help="Show the version and exit.")
    ] = False,
) -> None:
    """Define the options that stand before a command."""


def complete_recipe(begun: str) -> list[str]:
    """Return the recipes of the package, the TOML files and the folders whose names begin so."""
    from unmoved.runs import packaged_recipes

    here = sorted(glob.glob(f"{glob.escape(begun)}*"))
    paths = [path + os.sep if os.path.isdir(path) else path for path in here]
    return [name for name in packaged_recipes.names() if name.startswith(begun)] + [
        path for path in paths if path.endswith((os.sep, ".toml"))
    ]


RecipePath = Annotated[
    Path,
    typer.Argument(
        metavar="RECIPE", autocompletion=complete_recipe, help="A recipe of the package, such as digits/at, or a file."
    ),
]
RecipePaths = Annotated[
    list[Path],
    typer.Argument(
        metavar="RECIPE...", autocompletion=complete_recipe, help="Recipes of the package, such as digits/at, or files."
    ),
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
Sample = Annotated[
    int | None,
    typer.Option("--sample", min=1, help="With standard: ask AutoAttack about this many of those that quick leaves."),
]
Within = Annotated[
    float | None,
    typer.Option("--within", help="... about as many as give a 95 % interval of this many points each way."),
]
BatchSize = Annotated[int, typer.Option(min=1, help="Images a pass; the verdict does not depend on it.")]
AskDoctor = Annotated[bool, typer.Option("--doctor/--no-doctor", help="Ask the doctor too whether to believe it.")]
