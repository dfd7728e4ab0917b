"""Write a model card: the ``README.md`` of a model on the Hugging Face hub, metadata in YAML before the text.

The metadata are those that the hub's specification of model cards names (hub-docs, modelcard.md).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from unmoved.core.messages import printable
from unmoved.evaluation.estimate import Estimate
from unmoved.evaluation.outcomes import CLEAN, WORST
from unmoved.exports.exported_run import ExportedRun, Judgement, Result
from unmoved.exports.robustbench import architecture
from unmoved.runs.assembly import IN_PYTHON
from unmoved.runs.components import KINDS
from unmoved.runs.third_party import is_foreign

ESTIMATED = "AutoAttack (standard), sampled"
_MARKS = re.compile(r"([\\`*_{}\[\]<>#!|~&$])")


def model_card(exported: ExportedRun, weights: str) -> str:
    """Return the model card.

    Args:
        weights: the name of the file of weights.
    """
    parts = [
        "\n".join(["---", *_yaml(metadata(exported)), "---"]),
        f"# {text(exported.name)}",
        _opening(exported),
        "## Accuracy",
        *(_row(judgement) for judgement in exported.tested),
        _bound(exported),
        "## What the doctor says of these figures",
        _doctor(exported),
        "## What was allowed to the attacker",
        _threat(exported),
        "## How to load the weights",
        *_loading(exported, weights),
        "## What these figures do not say",
        _limits(exported),
        "## Evidence",
        _evidence(exported, weights),
    ]
    return "\n\n".join(parts) + "\n"


def text(words: object) -> str:
    """Escape text for Markdown: no markup, no line break, no control characters."""
    return _MARKS.sub(r"\\\1", printable(" ".join(str(words).split())))


# --- metadata


def metadata(exported: ExportedRun) -> dict[str, Any]:
    """Return the metadata of the card; the license only where the user gave one, data sets only of the hub."""
    data = exported.table("data")
    ids = [str(data["name"])] if data.get("use") == "hf" and data.get("name") else []
    split = exported.main.split
    dataset = {"type": ids[0] if ids else exported.dataset, "name": exported.dataset, "split": split.rpartition("/")[2]}
    metrics = [_metric(j, result) for j in exported.tested for result in j.results]
    metrics += [_estimated(j, j.estimate) for j in exported.tested if j.estimate is not None]
    return {
        **({"license": exported.about["license"]} if "license" in exported.about else {}),
        "library_name": "unmoved",
        "pipeline_tag": "image-classification",
        "tags": ["image-classification", "adversarial-robustness", "safetensors", f"{exported.main.norm}-robustness"],
        **({"datasets": ids} if ids else {}),
        "metrics": ["accuracy"],
        "model-index": [
            {
                "name": printable(exported.name),
                "results": [
                    {
                        "task": {"type": "image-classification", "name": "Image Classification"},
                        "dataset": dataset,
                        "metrics": metrics,
                    }
                ],
            }
        ],
    }


def _metric(judgement: Judgement, result: Result) -> dict[str, Any]:
    ball = "" if result.measure == CLEAN else f" ({judgement.norm}, eps {result.eps:.4g})"
    return {
        "type": "accuracy",
        "value": round(result.accuracy, 6),
        "name": f"Accuracy, {printable(label(judgement, result))}{ball}",
        "args": {
            "judged": judgement.kind,
            "n": result.n,
            "interval_95": [round(result.low, 6), round(result.high, 6)],
            "images_sha256": judgement.facts.get("images"),
        },
    }


def _estimated(judgement: Judgement, estimate: Estimate) -> dict[str, Any]:
    low, high = (round(count / estimate.n, 6) for count in estimate.interval)
    return {
        "type": "accuracy",
        "value": round(estimate.left / estimate.n, 6),
        "name": f"Accuracy, {ESTIMATED} ({judgement.norm}, eps {judgement.eps:.4g})",
        "args": {
            "judged": judgement.kind,
            "n": estimate.n,
            "survivors": estimate.survivors,
            "asked": estimate.asked,
            "interval_95": [round(share, 6) for share in estimate.population],
            "interval_95_of_these_images": [low, high],
            "images_sha256": judgement.facts.get("images"),
        },
    }


def _yaml(value: Any, indent: str = "") -> Iterator[str]:
    """Write plain data as YAML in lines; texts are in double quotes, as JSON writes them."""
    if isinstance(value, Mapping):
        for key, part in value.items():
            nested = isinstance(part, Mapping | list) and bool(part)
            yield f"{indent}{key}:" if nested else f"{indent}{key}: {json.dumps(part, ensure_ascii=False)}"
            if nested:
                yield from _yaml(part, indent + "  ")
        return
    for part in value:
        lines = list(_yaml(part, indent + "  ")) if isinstance(part, Mapping) else []
        yield f"{indent}- {lines[0].lstrip() if lines else json.dumps(part, ensure_ascii=False)}"
        yield from lines[1:]


# --- text


def label(judgement: Judgement, result: Result) -> str:
    """Return the name of a figure; AutoAttack's name, with its version, only for AutoAttack itself."""
    if result.measure == CLEAN:
        return "clean"
    if result.measure == WORST:
        return "worst case over these attacks"
    version = judgement.autoattack(result.measure)
    if version:
        return f"AutoAttack ({version})"
    made = judgement.settings(result.measure).partition("(")[0]
    return f"{result.measure} ({made})" if made else result.measure


def _opening(exported: ExportedRun) -> str:
    about = exported.about
    shape = "" if exported.shape is None else f" of shape {exported.shape}"
    sentence = "" if exported.doctor is None else exported.doctor.get("sentence", "")
    made = "trained and judged" if exported.trained else "trained elsewhere and judged"
    lines = [
        f"An image classifier (`{_code(architecture(exported))}`), {made} by unmoved: images{shape} in [0, 1] to "
        f"logits of {len(exported.classes) or 'its'} classes, normalisation inside.",
        f"**{_by(exported.main)}: {_headline(exported.main)} are right while an attacker may move each "
        f"by {exported.eps} in {exported.main.norm}**, {100 * exported.main.clean.accuracy:.1f} % without an attack. "
        "An accuracy under attack is an upper bound.",
    ]
    if sentence:
        lines.append(f"**The doctor: {text(sentence)}**")
    if paper := [text(about[key]) for key in ("title", "authors", "venue") if key in about]:
        lines.append("Described in: " + ", ".join(paper) + (f", <{about['link']}>" if "link" in about else "") + ".")
    elif "link" in about:
        lines.append(f"Described in: <{about['link']}>.")
    return "\n\n".join(lines)


def _headline(judgement: Judgement) -> str:
    """Return how many images are right in the worst case, with the interval; of a sampled verdict both intervals."""
    if (estimate := judgement.estimate) is not None:
        low, high = estimate.population
        return (
            f"an estimated {100 * estimate.left / estimate.n:.1f} % of {estimate.n} images "
            f"({text(_of_these(estimate))}; 95 % interval {100 * low:.1f} to {100 * high:.1f} %)"
        )
    worst = judgement.worst
    interval = f"95 % interval {100 * worst.low:.1f} to {100 * worst.high:.1f} %"
    return f"{100 * worst.accuracy:.1f} % of {worst.n} images ({interval})"


def _of_these(estimate: Estimate) -> str:
    """Return a sampled verdict's interval for these images alone, and the size of its sample."""
    low, high = (100 * count / estimate.n for count in estimate.interval)
    asked = f"{estimate.asked} of {estimate.survivors} survivors asked"
    return f"{asked}, {low:.1f} to {high:.1f} % of these images may be left"


def _by(judgement: Judgement) -> str:
    """Return the attacks of a judgement as a heading."""
    if judgement.estimate is not None:
        return "By AutoAttack (standard), sampled"
    versions = {judgement.autoattack(result.measure) for result in judgement.attacked}
    if None not in versions:
        return f"By AutoAttack ({', '.join(sorted(map(str, versions)))})"
    is_recipe = judgement.facts.get("asked") == "recipe"
    return "By the attacks of its recipe" if is_recipe else "By attacks of the user's choice"


def _row(judgement: Judgement) -> str:
    """Return a judgement as a table."""
    n = judgement.clean.n
    rows = [
        f"| {text(label(judgement, result))} | {'' if result.measure == CLEAN else f'{result.eps:.4g}'} | "
        f"{result.correct} of {result.n} | {100 * result.accuracy:.1f} % | "
        f"{100 * result.low:.1f} to {100 * result.high:.1f} % |"
        for result in judgement.results
        if not (result.measure == WORST and len(judgement.attacked) == 1)
    ]
    if (estimate := judgement.estimate) is not None:
        low, high = estimate.population
        rows.append(
            f"| {ESTIMATED} | {judgement.eps:.4g} | about {estimate.left:.0f} of {estimate.n} | "
            f"{100 * estimate.left / estimate.n:.1f} % | {100 * low:.1f} to {100 * high:.1f} % |"
        )
    lines = [
        f"### {_by(judgement)}, n = {n}",
        f"On {n} images of {text(judgement.split)}. Intervals are 95 % Wilson intervals over images"
        f"{'' if estimate is None else ', but for that of the estimate'}.",
        "\n".join(["| measure | eps | right | accuracy | 95 % interval |", "|---|---|---|---|---|", *rows]),
    ]
    if estimate is not None:
        lines.append(
            "AutoAttack was asked about the nearest of the images that the search above left, and about a random "
            f"sample of the others: {_of_these(estimate)}. The figure estimates what both together leave; its interval "
            "in the table is for all images like these, and covers the choice of the sample as well."
        )
    if notes := judgement.facts.get("notes"):
        lines.append("\n".join(f"- {text(note)}" for note in notes))
    settings = [*(judgement.settings(result.measure) for result in judgement.attacked), judgement.sampling]
    if any(settings):
        lines.append("The attacks, their seeds too:\n\n" + "\n".join(f"- `{_code(call)}`" for call in settings if call))
    return "\n\n".join(lines)


def _bound(exported: ExportedRun) -> str:
    said = "Each accuracy under attack is an **upper bound**: stronger attacks may find more."
    if exported.sampled is not None:
        said += " AutoAttack judged a sample: its figure estimates such a bound."
    elif exported.verdict is None:
        said += " AutoAttack did not judge this model."
    elif exported.standard is None:
        said += " AutoAttack's standard version did not judge this model; its version for randomised models did."
    return said


def _doctor(exported: ExportedRun) -> str:
    doctor = exported.doctor
    if doctor is None:
        return "Nobody asked it: no check for masked gradients or failed attacks was made on these figures."
    looked = f"It looked at {doctor['n']} images." if doctor.get("n") else ""
    found = [f"- **{f['grade']}**: {text(f['check'])}: {text(f['measured'])}" for f in doctor["findings"]]
    said = f"**{text(doctor['sentence'])}**" if doctor.get("sentence") else "It has no objection."
    return "\n\n".join([f"{said} {looked}".rstrip(), *(["\n".join(found)] if found else [])])


def _threat(exported: ExportedRun) -> str:
    main = exported.main
    return (
        f"The attacker knows the model, its weights too, and may change every pixel of an image as long as the change "
        f"stays within {exported.eps} in the {main.norm} norm and every pixel within [0, 1]."
    )


def _loading(exported: ExportedRun, weights: str) -> Iterator[str]:
    model = dict(exported.table("model"))
    use, normalize = str(model.pop("use", "")), model.pop("normalize", None)
    settings = [f"{key}={value!r}" for key, value in model.items() if key.isidentifier() and key != "weights"]
    shape = ", ".join(map(str, exported.shape or ("channels", "height", "width")))
    classes = len(exported.classes) or "classes"
    if exported.table("data").get("use") == IN_PYTHON:
        name = _code(use.partition(":")[2])
        yield f"The model came as an object of Python, of class `{name}`: build it as its author does, then:"
        lines = ["from unmoved import models", ""]
    elif is_foreign(use):
        module, _, name = use.partition(":")
        yield "The model is built by code that is not part of unmoved:"
        lines = ["import inspect", "", f"from {module} import {name}", "from unmoved import models", ""]
        lines += [f'given = {{"shape": ({shape}), "num_classes": {classes}}}  # where it has parameters of these names']
        lines += [
            f"given = {{key: value for key, value in given.items() if key in inspect.signature({name}).parameters}}"
        ]
        lines += [f"model = {name}({', '.join(['**given', *settings])})"]
    elif use in KINDS["models"]:
        call = ", ".join([f"shape=({shape})", f"num_classes={classes}", *settings])
        lines = ["from unmoved import models", "", f"model = models.{use}({call})"]
    else:
        yield f"Its recipe names no model that this version of unmoved knows: `{_code(use)}`."
        return
    if isinstance(normalize, Mapping):
        lines.append(f"model = models.normalized(model, {normalize.get('mean')!r}, {normalize.get('std')!r})")
    lines += [f'models.load_weights(model, "{weights}")', "model.eval()  # images in [0, 1], (B, C, H, W) -> logits"]
    yield "```python\n" + "\n".join(map(_code, lines)) + "\n```"
    if exported.shape is None or not exported.classes:
        yield "No file of the run says what stands there as a word: the shape of an image or the number of classes."


def _code(line: str) -> str:
    """Return a line for a code span: no line break and no backtick."""
    return " ".join(printable(line).split("\n")).replace("`", "'")


def _limits(exported: ExportedRun) -> str:
    main, seeds = exported.main, "The figures are of one training run"
    points = [
        "They are no guarantee and no certificate: a stronger attack, or one adapted to this model, may break more.",
        f"They are about changes within {exported.eps} in {main.norm}. Larger ones, other norms, rotations, patches, "
        "noise, blur and what a camera does are not covered.",
        f"They are about {main.clean.n} images of {text(main.split)}; on other data accuracies differ.",
        "The intervals say how far chance in the choice of images reaches, and nothing else. "
        + (
            f"{seeds} (seed {exported.evaluated.seed}); another seed gives other figures."
            if exported.trained
            else "The model was trained elsewhere; how much its figures vary from training to training is not known."
        ),
        "Nothing was checked of poisoned training data, stolen or inverted models, privacy, fairness or calibration.",
    ]
    if exported.sampled is not None:
        points.insert(1, "AutoAttack's figure is an estimate from a sample: compare its interval with others' figures.")
    elif exported.standard is None:
        points.insert(1, "They are not comparable with figures by AutoAttack, such as RobustBench's, which are lower.")
    if any(judgement.kind == "validation" for judgement in exported.judgements):
        points.append("Settings were chosen on validation images; their figures are in `evidence.json` and not here.")
    return "\n".join(f"- {point}" for point in points)


def _evidence(exported: ExportedRun, weights: str) -> str:
    images: Sequence[str] = [str(j.facts["images"]) for j in exported.tested if j.facts.get("images")]
    lines = [
        "`evidence.json` says what was tried, on which data by hash, by which versions and with which result; "
        "`doctor.sarif` has the doctor's findings in SARIF 2.1.0, `robustbench.json` the model as an entry of "
        "RobustBench. `unmoved export --verify FOLDER` says whether a file was changed since.",
        f"- `{weights}`: sha256 `{exported.sha256}`",
        *(f"- images judged: sha256 `{_code(digest)}`" for digest in dict.fromkeys(images)),
    ]
    return lines[0] + "\n\n" + "\n".join(lines[1:])
