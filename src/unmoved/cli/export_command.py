"""Define the command that hands a model on: export."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from unmoved.cli import screen
from unmoved.cli.options import app


@app.command()
def export(
    run: Annotated[
        Path | None, typer.Argument(metavar="[RUN]", help="An evaluated run folder; with --verify also an export.")
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", help="The folder to write; RUN/export by default.")] = None,
    verify: Annotated[
        bool, typer.Option("--verify", help="Write nothing: say which files were changed since they were exported.")
    ] = False,
    about: Annotated[
        list[str],
        typer.Option("--about", metavar="KEY=VALUE", help="For the model card: license, title, authors, link, venue."),
    ] = [],  # noqa: B006
    schema: Annotated[bool, typer.Option("--schema", help="Print the JSON schema of evidence.json instead.")] = False,
) -> None:
    """Hand a judged model on, with evidence of its verdict.

    Weights, model card, RobustBench's entry, evidence with hashes, findings in SARIF.
    """
    from unmoved.core.errors import UnmovedError
    from unmoved.exports import evidence
    from unmoved.exports import folder as exports
    from unmoved.runs.folder import Run

    if schema:
        sys.stdout.write(json.dumps(evidence.schema(), indent=2) + "\n")
        return
    if run is None:
        raise UnmovedError("export: expected a run folder or --schema, came neither")
    if verify:
        folder = exports.export_folder(run) if out is None else out
        listing = exports.verify(folder)
        screen.say(
            f"intact: {folder}: {len(listing.files) + 1} files are as unmoved {listing.program.unmoved} exported them, "
            f"{listing.program.written}"
        )
        return
    pairs = [word.partition("=") for word in about]
    if odd := [word for word, (_, sign, _) in zip(about, pairs, strict=True) if not sign]:
        raise UnmovedError(f"--about: expected KEY=VALUE such as license=mit, came {odd[0]!r:.80}")
    opened = Run.open(run)
    folder, exported = exports.export_run(opened, out, {key: value for key, _, value in pairs})
    for line in exported.left_out:
        screen.say(f"note: {line}")
    if opened.doctor is None:
        screen.say(f"note: the doctor was not asked, and the export says so: `unmoved doctor {run}`")
    if exported.sampled is not None:
        screen.say(
            "note: AutoAttack was asked about a sample, and the export says so wherever its figure stands; the "
            f"complete verdict: `unmoved evaluate {run} --attacks standard`"
        )
    elif exported.verdict is None:
        screen.say(
            f"note: AutoAttack did not judge it, and the export says so: `unmoved evaluate {run} --attacks standard`"
        )
    screen.say(f"exported: {folder}\nnext: unmoved export --verify {folder}")
