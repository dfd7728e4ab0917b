"""The judge: attacks propose, the judge decides, in float32, and raises on anything outside the rules."""

from __future__ import annotations

import dataclasses
import hashlib
import math
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

import numpy as np
import pandas as pd
import torch
from torch import nn

from unmoved import config, views
from unmoved.attacks import PGD
from unmoved.errors import UnmovedError, require_number
from unmoved.outcomes import COLUMNS
from unmoved.precision import autocast, require_device
from unmoved.protocols import Attack, Batch, Image, Label, Split
from unmoved.run import Run
from unmoved.threat import ThreatModel
from unmoved.weights import evaluating

Progress = Callable[[int, int], None]


def evaluate(
    model: nn.Module,
    split: Split,
    attacks: Mapping[str, Attack],
    threat: ThreatModel,
    *,
    batch_size: int = 256,
    precision: str = "float32",
    progress: Progress | None = None,
) -> pd.DataFrame:
    """Outcomes of attacks on a model: one row per sample and attack, judged in float32 in evaluation mode.

    Attacks run on the samples that the model gets right; a sample misclassified as it is counts as lost with distance
    0. No image outside the ball or outside [0, 1] is ever counted.

    Args:
        model: images (B, C, H, W) in [0, 1] -> logits (B, K); on any device.
        split: the data.
        attacks: name -> attack.
        threat: the ball that the judge holds every proposal to.
        batch_size: images a pass; the verdict does not depend on it.
        precision: of the search alone: ``"float32"``, ``"bf16"`` or ``"auto"``.
        progress: called with (done, total) batches times attacks.

    Returns:
        A table with the columns of `unmoved.outcomes`.

    Raises:
        UnmovedError: no attack or no data; images or labels out of range; logits that are not finite; a proposal
            outside the threat model.
    """
    if not attacks:
        raise UnmovedError("evaluate: expected at least one attack, came none")
    require_number("batch_size", batch_size, at_least=1)
    if len(split) == 0:
        raise UnmovedError("evaluate: expected at least one sample, came none")
    rows: list[pd.DataFrame] = []
    total, done = -(-len(split) // batch_size) * len(attacks), 0
    for batch in _checked_batches(model, split, batch_size, threat):
        clean = predict(model, batch.x, batch.y)
        right = clean == batch.y
        attacked = batch.take(right)
        for name, attack in attacks.items():
            adversarial, distance = clean.clone(), torch.zeros(len(batch), dtype=torch.float64, device=clean.device)
            if len(attacked):
                proposal = propose(model, attack, attacked, threat, name, precision)
                adversarial[right] = predict(model, proposal, attacked.y)
                distance[right] = threat.distance(proposal, attacked.x)
            rows.append(_rows(batch, name, threat, clean, adversarial, distance))
            done += 1
            if progress is not None:
                progress(done, total)
    return pd.concat(rows, ignore_index=True).sort_values(["attack", "index"], kind="stable", ignore_index=True)


def propose(
    model: nn.Module, attack: Attack, batch: Batch, threat: ThreatModel, name: str, precision: str = "float32"
) -> Image:
    """One attack's proposal, checked against the threat model."""
    # Copies: an attack that writes into its images would be measured against its own proposal.
    theirs = dataclasses.replace(batch, x=batch.x.clone(), y=batch.y.clone())
    with autocast(precision, batch.x.device):
        proposal = attack(model, theirs)
    if not isinstance(proposal, torch.Tensor):
        raise UnmovedError(f"attack {name!r}: expected a tensor of images, came {type(proposal).__name__}")
    if proposal.dtype != batch.x.dtype:
        raise UnmovedError(f"attack {name!r}: expected images of {batch.x.dtype}, came {proposal.dtype}")
    threat.check(proposal, batch.x, name)
    return proposal.detach()


def predict(model: nn.Module, x: Image, y: Label) -> Label:
    """The predicted class (B,), in float32 and evaluation mode.

    Raises:
        UnmovedError: logits that are not finite, or labels that the logits have no column for.
    """
    with torch.no_grad(), evaluating(model), torch.autocast(x.device.type, enabled=False):
        logits = views.logits(model, x)
    if not torch.isfinite(logits).all():
        raise UnmovedError(
            f"model {type(model).__name__}: expected finite logits, came NaN or infinity; a verdict would mean nothing"
        )
    if len(y) and int(y.max()) >= logits.shape[1]:
        raise UnmovedError(
            f"labels: expected 0..{logits.shape[1] - 1} for {logits.shape[1]} logits, came {int(y.max())}"
        )
    return logits.argmax(dim=1)


def curve(
    model: nn.Module,
    split: Split,
    attack: Attack,
    threat: ThreatModel,
    eps: Sequence[float],
    *,
    name: str = "pgd",
    batch_size: int = 256,
    progress: Progress | None = None,
) -> pd.DataFrame:
    """Outcomes of one attack at several radii, the attack's own threat model replaced at each.

    Raises:
        UnmovedError: an attack that is no dataclass with a ``threat`` field.
    """
    fields: set[str] = {f.name for f in dataclasses.fields(attack)} if dataclasses.is_dataclass(attack) else set()
    if "threat" not in fields:
        raise UnmovedError(f"curve: expected an attack with a threat field, came {attack!r}")
    tables = []
    for done, radius in enumerate(eps):
        ball = dataclasses.replace(threat, eps=radius)
        ours = dataclasses.replace(attack, threat=ball)  # type: ignore[type-var]
        tables.append(evaluate(model, split, {name: ours}, ball, batch_size=batch_size))
        if progress is not None:
            progress(done + 1, len(eps))
    return pd.concat(tables, ignore_index=True)


def gallery(
    model: nn.Module, split: Split, attack: Attack, threat: ThreatModel, count: int = 8, name: str = "attack"
) -> dict[str, np.ndarray]:
    """The first samples that the model gets right, with what the attack made of them, as arrays for `unmoved.run`."""
    parts: list[dict[str, np.ndarray]] = []
    missing = count
    for batch in _checked_batches(model, split, 4 * count, threat):
        clean = predict(model, batch.x, batch.y)
        chosen = torch.nonzero(clean == batch.y).flatten()[:missing]
        if len(chosen) == 0:
            continue
        taken = batch.take(chosen)
        proposal = propose(model, attack, taken, threat, name)
        parts.append(
            {
                "x": taken.x.cpu().numpy(),
                "x_adv": proposal.cpu().numpy(),
                "label": taken.y.cpu().numpy(),
                "clean_prediction": clean[chosen].cpu().numpy(),
                "adversarial_prediction": predict(model, proposal, taken.y).cpu().numpy(),
                "attack": np.array([name] * len(taken)),
            }
        )
        missing -= len(taken)
        if missing == 0:
            break
    if not parts:
        return {}
    return {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}


def _checked_batches(model: nn.Module, split: Split, size: int, threat: ThreatModel) -> Iterator[Batch]:
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    low, high = threat.bounds
    for batch in split.batches(size):
        if len(batch) and not (batch.x.min() >= low and batch.x.max() <= high):
            raise UnmovedError(
                f"images: expected values in [{low:g}, {high:g}], came {batch.x.min():g} to {batch.x.max():g}; "
                "divide 8-bit images by 255 and put any normalisation inside the model"
            )
        if len(batch) and int(batch.y.min()) < 0:
            raise UnmovedError(f"labels: expected 0 or more, came {int(batch.y.min())}")
        yield batch.to(device)


def _rows(
    batch: Batch, name: str, threat: ThreatModel, clean: Label, adversarial: Label, distance: torch.Tensor
) -> pd.DataFrame:
    table = pd.DataFrame(
        {
            "index": batch.index.cpu().numpy(),
            "label": batch.y.cpu().numpy(),
            "attack": name,
            "eps": threat.radius,
            "norm": threat.norm,
            "clean_prediction": clean.cpu().numpy(),
            "adversarial_prediction": adversarial.cpu().numpy(),
            "distance": distance.cpu().numpy(),
            "success": (adversarial != batch.y).cpu().numpy(),
        }
    )
    return table[list(COLUMNS)]


CURVE_SHARES = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0)
CURVE_SAMPLES = 500


def evaluate_run(
    run: Run,
    *,
    n: int | None = None,
    weights: str = "best",
    batch_size: int = 256,
    device: str = "auto",
    allow: Collection[str] = (),
    progress: Progress | None = None,
) -> pd.DataFrame:
    """Judge a run on the test part of its data and save outcomes, eps curve and gallery in its folder.

    Args:
        run: a run folder.
        n: judge this many test images, drawn by a fixed seed; by default what the recipe says, or all.
        weights: ``"best"`` (highest validation robust accuracy) or ``"last"``.
        allow: packages of strangers whose code may run.

    Returns:
        The outcomes table of `evaluate`.

    Raises:
        UnmovedError: as `evaluate`; weights that are missing or do not fit.
    """
    require_device(device)
    began = time.monotonic()
    built = config.Built(config.parse(run.recipe, str(run.path / "recipe.toml")), allow)
    model = built.model()
    run.load_weights(model, weights)
    model.to(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # the same numbers, faster convolutions
    count = n or built.recipe.evaluation.n
    split = built.data.test if count is None else built.data.test.take(min(count, len(built.data.test)), seed=0)
    steps = radii(built.threat)
    batches = -(-len(split) // batch_size) * len(built.attacks)

    def advance(done: int, before: int = 0) -> None:
        if progress is not None:
            progress(before + done, batches + len(steps))

    table = evaluate(
        model, split, built.attacks, built.threat, batch_size=batch_size, progress=lambda done, _: advance(done)
    )
    sweep = PGD(built.threat, steps=20, keep="best", seed=built.recipe.training.seed)
    few = split.take(min(CURVE_SAMPLES, len(split)), seed=0)
    curve_table = curve(
        model,
        few,
        sweep,
        built.threat,
        steps,
        batch_size=batch_size,
        progress=lambda done, _: advance(done, before=batches),
    )
    name, shown = next(reversed(built.attacks.items()))
    facts = {
        "n": len(split),
        "split": split.name,
        "weights": weights,
        "weights_sha256": weights_digest(run, weights),
        "threat": {"norm": built.threat.norm, "eps": built.threat.radius},
        "attacks": {name: repr(attack) for name, attack in built.attacks.items()},
        "classes": list(built.data.test.classes),
        "seconds": round(time.monotonic() - began, 1),
    }
    run.save_evaluation(table, curve_table, gallery(model, split, shown, built.threat, name=name), facts)
    return table


def radii(threat: ThreatModel) -> list[float]:
    """Where the curve is measured: shares of eps; for linf nothing beyond the box of valid images."""
    largest = threat.bounds[1] - threat.bounds[0] if threat.norm == "linf" else math.inf
    return sorted({min(share * threat.radius, largest) for share in CURVE_SHARES})


def weights_digest(run: Run, weights: str) -> str:
    """The sha256 of a weights file: says which weights a verdict is about."""
    return hashlib.sha256((run.path / f"{weights}.safetensors").read_bytes()).hexdigest()
