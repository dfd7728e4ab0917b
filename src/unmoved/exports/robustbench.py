"""Write a model as an entry of RobustBench (Croce et al. 2021), a file of its folder ``model_info``."""

from __future__ import annotations

from typing import Any

from unmoved.evaluation.doctor.finding import DO_NOT_BELIEVE
from unmoved.exports.exported_run import ExportedRun, Judgement, Result
from unmoved.runs.components import KINDS


def robustbench(exported: ExportedRun) -> dict[str, Any]:
    """Return the entry: RobustBench's fields in its order and units, None for unknown values.

    Accuracies are percentages in texts, as there. ``autoattack_acc`` is AutoAttack's standard version alone;
    ``reported`` is the worst case over the attacks of the recipe, a weaker bound, and ``footnote`` names them, the
    number of images and the norm, and gives a sampled verdict with its intervals, for which the entry has no field.
    ``clean_acc`` is of the same images as ``autoattack_acc``, if that is known.
    """
    standard = exported.standard
    own = next((judgement for judgement in exported.judgements if judgement.kind == "evaluation"), None)
    model = exported.table("model")
    is_ours = model.get("use") in KINDS["models"]
    from_scratch = exported.trained and is_ours and not model.get("weights") and not model.get("pretrained")
    doctor = exported.doctor
    return {
        "link": exported.about.get("link"),
        "name": exported.about.get("title"),
        "authors": exported.about.get("authors"),
        "additional_data": False if from_scratch else None,
        "number_forward_passes": 1 if is_ours else None,
        "dataset": exported.dataset,
        "venue": exported.about.get("venue"),
        "architecture": architecture(exported),
        "eps": exported.eps,
        "clean_acc": _percent(exported.main.clean),
        "reported": None if own is None else _percent(own.worst),
        "autoattack_acc": None if standard is None else _percent(standard.worst),
        "footnote": " ".join(_said(judgement) for judgement in exported.tested),
        "unreliable": None if doctor is None else any(f["grade"] == DO_NOT_BELIEVE for f in doctor["findings"]),
    }


def architecture(exported: ExportedRun) -> str:
    """Return the model's name in the recipe with its settings: ``small_cnn(width=16)``."""
    model = dict(exported.table("model"))
    use = str(model.pop("use", "unknown"))
    settings = ", ".join(f"{key}={value!r}" for key, value in model.items() if key != "weights")
    return f"{use}({settings})" if settings else use


def _percent(result: Result) -> str:
    return str(round(100 * result.accuracy, 2))


def _said(judgement: Judgement) -> str:
    """Return a sentence about how an accuracy was measured."""
    worst, names = judgement.worst, []
    for result in judgement.attacked:
        version = judgement.autoattack(result.measure)
        made = judgement.settings(result.measure).partition("(")[0] or "unknown"
        names.append(f"AutoAttack {version}" if version else f"{result.measure} ({made}, not AutoAttack)")
    sampled = ""
    if (estimate := judgement.estimate) is not None:
        low, high = estimate.population
        least, most = (100 * count / estimate.n for count in estimate.interval)
        sampled = (
            f"; AutoAttack standard, sampled, {estimate.asked} of {estimate.survivors} survivors of it asked: "
            f"{100 * estimate.left / estimate.n:.2f} % ({least:.2f} to {most:.2f} % of these images; 95 % interval "
            f"{100 * low:.2f} to {100 * high:.2f} %)"
        )
    notes = "".join(f"; {note}" for note in judgement.facts.get("notes") or ())
    return (
        f"{_percent(worst)} % under {', '.join(names)} in {judgement.norm}, on n = {worst.n} images of "
        f"{judgement.split} (95 % interval {100 * worst.low:.2f} to {100 * worst.high:.2f} %){sampled}{notes}."
    )
