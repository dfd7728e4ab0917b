"""Define the command that judges a model which was trained elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from unmoved.cli import screen
from unmoved.cli.options import Allow, AskDoctor, Attacks, BatchSize, Device, Number, Sample, Within, app

if TYPE_CHECKING:
    from unmoved.core.untrusted import Json
    from unmoved.reports.judgement import Judgement

Model = Annotated[
    str, typer.Argument(metavar="MODEL", help="my_models:MyNet with --allow my_models, timm:NAME, or ours.")
]
Data = Annotated[str, typer.Option(help="Its test part is judged: mnist:PATH, cifar10:PATH, folder:PATH, digits.")]
Eps = Annotated[str, typer.Option(help="Radius of the ball, on images in 0..1: 0.3 or 8/255.")]
Out = Annotated[Path, typer.Option(help="The run folder to make; what is in it goes on.")]
Weights = Annotated[
    Path | None, typer.Option(help="safetensors, .pt or .pth: a state_dict, alone or under its usual keys.")
]
Mean = Annotated[str | None, typer.Option(help="What images were normalised by in training, per channel.")]
Deviation = Annotated[str | None, typer.Option(help="The same: the deviation.")]
Match = Annotated[str, typer.Option(help="names, or order: the file's tensors are the model's in order.")]
Ignore = Annotated[
    list[str], typer.Option(metavar="PATTERN", help="Names in the file that the model has no place for. Repeats.")
]
Key = Annotated[str | None, typer.Option(help="Under which key of the file the weights stand.")]
ModelSet = Annotated[
    list[str], typer.Option("--model-set", metavar="KEY=VALUE", help="An argument of the model. Repeats.")
]
DataSet = Annotated[list[str], typer.Option("--data-set", metavar="KEY=VALUE", help="A setting of the data. Repeats.")]


@app.command()
def judge(
    model: Model,
    data: Data,
    eps: Eps,
    out: Out,
    weights: Weights = None,
    norm: Annotated[str, typer.Option(help="linf, l2 or l1.")] = "linf",
    attacks: Attacks = "standard",
    n: Number = None,
    sample: Sample = None,
    within: Within = None,
    mean: Mean = None,
    std: Deviation = None,
    match: Match = "names",
    ignore: Ignore = [],  # noqa: B006 - typer's way to say 'none'
    key: Key = None,
    model_set: ModelSet = [],  # noqa: B006
    data_set: DataSet = [],  # noqa: B006
    batch_size: BatchSize = 128,
    ask_doctor: AskDoctor = True,
    allow: Allow = [],  # noqa: B006
    device: Device = "auto",
) -> None:
    """Judge a model that was trained anywhere. Verdict, doctor and report in one command."""
    from unmoved import any_model
    from unmoved.core import errors, messages
    from unmoved.runs import recipe as config
    from unmoved.runs import shorthand

    errors.require_choice("--match", match, ("names", "order"))
    file: Json | None = None if weights is None else {"file": str(weights), "match": match, "ignore": [*ignore]}
    file = file if file is None or key is None else file | {"key": key}
    tables: Json = {
        "name": out.name or "judged",
        "trained": False,
        "model": shorthand.model_table(model, model_set, weights=file, mean=mean, std=std),
        "data": shorthand.data_table(data, data_set),
        "threat": {"norm": norm, "eps": eps},
    }
    recipe = config.parse(tables, "judge")
    with messages.shown(screen.say), screen.follow() as progress:
        judgement = any_model.judge_recipe(
            recipe,
            out,
            attacks=attacks,
            n=n,
            sample=sample,
            within=within,
            doctor=ask_doctor,
            batch_size=batch_size,
            allow=allow,
            device=device,
            progress=progress,
        )
    _say(judgement, is_sample=sample is not None or within is not None)
    screen.say(f"saved: {out}\nreport: {judgement.report(out / 'report.html')}")


def _say(judgement: Judgement, is_sample: bool) -> None:
    """Print what was found; say where a sample that was asked for is all there is."""
    title = screen.BOUND if judgement.estimate is None else screen.SEARCH
    screen.print_summary({judgement.run.name: judgement.outcomes}, title)
    if judgement.estimate is not None:
        screen.print_estimate(judgement.run.sampled)
    elif is_sample:
        screen.say(screen.COMPLETE)
    for note in judgement.notes:
        screen.say(f"note: {note}")
    if judgement.doctor is not None:
        screen.say(f"doctor: {judgement.doctor['sentence'] or 'no objection'}")
