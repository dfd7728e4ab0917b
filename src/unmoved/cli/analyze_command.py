"""Define the command analyze, whose options are those of all analyses: each says in its help whose it is."""

from __future__ import annotations

import inspect
from dataclasses import Field, fields
from pathlib import Path
from typing import Annotated

import typer

from unmoved.analyses.studies import STUDIES, subjects
from unmoved.analyses.studies.kind import Option
from unmoved.cli import screen
from unmoved.cli.options import Allow, Device
from unmoved.core.errors import require_choice
from unmoved.runs.folder import Run

app = typer.Typer(
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
*OTHERS, LAST = STUDIES


def analyze(
    context: typer.Context,
    what: Annotated[str, typer.Argument(metavar="WHAT", help=f"{', '.join(OTHERS)} or {LAST}.")],
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run folders, on the same data.")],
    out: Annotated[Path, typer.Option(help="Folder for tables, figures and page: OUT/WHAT/.")] = Path("runs/analysis"),
    n: Annotated[int, typer.Option("--n", min=1, help="Test images to look at; all, where there are fewer.")] = 1000,
    *,
    weights: Annotated[str, typer.Option(help="best (by validation robust accuracy) or last.")] = "best",
    allow: Allow = [],  # noqa: B006
    device: Device = "auto",
    **options: object,
) -> None:
    """Say why models are robust, and at what price. Tables and figures; goes on where interrupted."""
    require_choice("analyze", what, STUDIES)
    require_choice("--weights", weights, ("best", "last"))
    sources = {name: context.get_parameter_source(name) for name in options}
    given = {name for name, source in sources.items() if source is not None and source.name != "DEFAULT"}
    analysis = STUDIES[what].of({name: value for name, value in options.items() if name in given})
    opened = subjects([Run.open(run) for run in runs], n, weights=weights, device=device, allow=allow)
    with screen.follow() as advance:
        study = analysis(opened, advance)
    page = study.write(out)
    for sentence in study.sentences:
        screen.say(f"- {sentence}")
    screen.say(f"saved: {page.parent}\npage: {page}")


def _parameter(name: str, declared: dict[str, Field[object]]) -> inspect.Parameter:
    """Return the option of one or several analyses, given by their names, as typer reads it."""
    options: dict[str, Option] = {kind: one.metadata["option"] for kind, one in declared.items()}
    words = " ".join(f"{kind}: {option.help}" for kind, option in options.items())
    option, default = next(iter(options.values())), next(iter(declared.values())).default
    flag = f"--{name}/--no-{name}" if default is True else f"--{name}"
    return inspect.Parameter(
        name,
        inspect.Parameter.KEYWORD_ONLY,
        default=",".join(default) if isinstance(default, tuple) else default,
        annotation=Annotated[
            bool if isinstance(default, bool) else str | None if option.parse else int | None,
            typer.Option(flag, min=option.at_least, help=words),
        ],
    )


def _signature() -> inspect.Signature:
    """Return the signature of `analyze` with the options of all analyses in place of ``**options``."""
    declared: dict[str, dict[str, Field[object]]] = {}
    for _, kind in sorted(STUDIES.items()):
        for one in fields(kind):
            declared.setdefault(one.name, {})[kind.name] = one
    signature = inspect.signature(analyze, eval_str=True)
    parameters = list(signature.parameters.values())[:-1]
    place = next(k for k, one in enumerate(parameters) if one.kind is inspect.Parameter.KEYWORD_ONLY)
    parameters[place:place] = [_parameter(name, owners) for name, owners in declared.items()]
    return signature.replace(parameters=parameters)


vars(analyze)["__signature__"] = _signature()
app.command()(analyze)
