"""Check a model's outputs for signs of trouble: training mode, randomness, dependence on the batch, wrong scale."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.dropout import _DropoutNd

from unmoved.core.batch import Image
from unmoved.core.errors import UnmovedError
from unmoved.evaluation.doctor.evidence import PASSES, Evidence, differ
from unmoved.evaluation.doctor.finding import DO_NOT_BELIEVE, LOOK_CLOSER, Finding

SUMS_TO_ONE = 1e-3  # half-precision probabilities sum to 1 within this; logits of many samples do not by chance
# Accuracy gained by (un)normalising: honest digits and MNIST models gain at most 3 points, mistaken ones tens.
GAIN_CLOSER, GAIN_WRONG = 0.1, 0.2
SIGNIFICANT = 3.0  # standard errors of a paired difference: eight transforms are tried, so two would be too few


def mode(evidence: Evidence) -> Finding | None:
    """Find a model in training mode, if that changes its outputs."""
    training = [module for module in evidence.model.modules() if getattr(module, "training", False)]
    if not training:
        return None
    with torch.random.fork_rng(devices=_cuda(evidence.batch.x)):
        first, again = (_with_rng(evidence, evidence.batch.x, draw) for draw in (0, 1))
    if differ(first, again):
        what = "two passes over the same images differ"
    elif _depends_on_companions(evidence, "train"):
        what = "the outputs of an image change with the other images of the batch"
    elif differ(evidence.clean, first):
        what = "the outputs are others than in evaluation mode"
    else:
        return None
    behind = {type(m).__name__ for m in training if isinstance(m, _DropoutNd | _NormBase)} or {
        type(evidence.model).__name__
    }
    return Finding(
        "training mode",
        DO_NOT_BELIEVE,
        f"the model was handed over in training mode ({', '.join(sorted(behind))}): {what}",
        "dropout and batch statistics add noise that attacks stumble over and that nobody deploys; attack code that "
        "does not switch modes measures this noise, not robustness",
        "call model.eval() before attacking and evaluating; the other checks here were made in evaluation mode",
    )


def stochastic(evidence: Evidence) -> Finding | None:
    """Find outputs that are random even in evaluation mode."""
    if not evidence.is_random:
        return None
    return Finding(
        "randomness",
        DO_NOT_BELIEVE,
        f"in evaluation mode {PASSES} passes over the same {len(evidence.batch)} images do not agree",
        "each gradient is that of another draw, so an attack that takes one gradient a step wanders; and one lucky "
        "draw counts as robust",
        'average gradients over draws (EOT): AutoAttack(threat, version="rand"); report the accuracy over many draws',
    )


def companions(evidence: Evidence) -> Finding | None:
    """Find outputs for an image that depend on the other images of its batch, in evaluation mode."""
    if evidence.is_random or not _depends_on_companions(evidence, "eval"):
        return None
    return Finding(
        "companions in the batch",
        DO_NOT_BELIEVE,
        "in evaluation mode the outputs of an image change with the other images of its batch",
        "the verdict then depends on batch size and order, one perturbed image moves the others, and batches that are "
        "sorted by class leak the label",
        "normalise by running statistics in evaluation mode (BatchNorm with track_running_stats=True and model.eval())",
    )


def probabilities(evidence: Evidence) -> Finding | None:
    """Find probabilities where logits are expected."""
    out = evidence.clean
    if float(out.min()) < 0 or float(out.max()) > 1 + SUMS_TO_ONE:
        return None
    sums_to_one = bool(((out.sum(dim=1) - 1).abs() < SUMS_TO_ONE).all())
    if sums_to_one:
        return Finding(
            "probabilities",
            DO_NOT_BELIEVE,
            f"all {len(out)} rows of outputs are nonnegative and sum to 1: probabilities, not logits",
            "cross-entropy applies a second softmax to them, whose gradient is flat or exactly zero where the model is "
            "sure, so attacks stall and the accuracy looks robust",
            "return logits: leave the softmax out of the model (log-probabilities are fine)",
        )
    return Finding(
        "bounded outputs",
        LOOK_CLOSER,
        "all outputs lie in [0, 1] without summing to 1: sigmoids rather than logits?",
        "cross-entropy expects logits; squashed outputs flatten its gradient",
        "return what goes into the last squashing function",
    )


def normalisation(evidence: Evidence) -> Finding | None:
    """Find a clean accuracy that jumps when the images are normalised, un-normalised or rescaled first."""
    right = evidence.clean.argmax(dim=1) == evidence.batch.y
    best: tuple[float, str, float] | None = None
    for name, transform in _transforms(evidence.model, evidence.batch.x):
        try:
            out = evidence.logits(transform(evidence.batch.x))
        except (
            UnmovedError,
            ValueError,
            RuntimeError,
        ):  # a model may refuse such pixels: then it was not made for them
            continue
        other = out.argmax(dim=1) == evidence.batch.y
        if evidence.is_random or not out.isfinite().all():
            continue
        gain = float((other.float() - right.float()).mean())
        error = float((other != right).sum()) ** 0.5 / len(right)
        if gain >= GAIN_CLOSER and gain > SIGNIFICANT * error and (best is None or gain > best[0]):
            best = (gain, name, float(other.float().mean()))
    if best is None:
        return None
    gain, name, accuracy = best
    return Finding(
        "normalisation",
        DO_NOT_BELIEVE if gain >= GAIN_WRONG else LOOK_CLOSER,
        f"clean accuracy is {right.float().mean():.1%} on the images as they are and {accuracy:.1%} after {name}",
        "the model seems to be made for pixels of another scale; what is attacked here is another function than the "
        "one that was trained, and eps means something else",
        "put exactly one normalisation inside the model (unmoved.models.normalized) and hand over images in [0, 1]",
    )


def nothing_right(evidence: Evidence) -> Finding | None:
    """Find a model that gets nothing right, so that there is no accuracy to lose."""
    return Finding(
        "nothing right",
        DO_NOT_BELIEVE,
        f"the model gets none of {len(evidence.batch)} samples right",
        "robust accuracy is at most clean accuracy; nothing can be said of attacks",
        "check the weights, the normalisation and the order of the classes",
    )


def _transforms(model: nn.Module, x: Image) -> Iterator[tuple[str, Callable[[Image], Image]]]:
    """List the transforms that would undo a missing or a double normalisation."""
    pixels = x.transpose(0, 1).flatten(1)
    known = {"the data's mean and std": (pixels.mean(dim=1), pixels.std(dim=1).clamp_min(1e-6))}
    known["mean 0.5 and std 0.5"] = (x.new_tensor([0.5]), x.new_tensor([0.5]))
    if x.shape[1] == 3:
        known["ImageNet's mean and std"] = (x.new_tensor([0.485, 0.456, 0.406]), x.new_tensor([0.229, 0.224, 0.225]))
    for module in model.modules():
        mean, std = getattr(module, "mean", None), getattr(module, "std", None)
        if isinstance(mean, Tensor) and isinstance(std, Tensor) and {mean.numel(), std.numel()} <= {1, x.shape[1]}:
            known[f"the mean and std of the model's {type(module).__name__}"] = mean, std
    for name, (mean, std) in known.items():
        yield f"normalising by {name} (none inside?)", partial(_normalised, mean=mean, std=std)
        yield f"undoing {name} (normalised twice?)", partial(_restored, mean=mean, std=std)
    yield "multiplying by 255 (made for 0..255?)", lambda x: x * 255
    yield "dividing by 255 (divided twice?)", lambda x: x / 255


def _normalised(x: Image, mean: Tensor, std: Tensor) -> Image:
    return (x - mean.reshape(-1, 1, 1)) / std.reshape(-1, 1, 1)


def _restored(x: Image, mean: Tensor, std: Tensor) -> Image:
    return x * std.reshape(-1, 1, 1) + mean.reshape(-1, 1, 1)


def _depends_on_companions(evidence: Evidence, mode: str) -> bool:
    """Return whether the first half's outputs change when the second half is replaced; the batch keeps its size."""
    x = evidence.batch.x
    half = len(x) // 2
    low, high = evidence.threat.bounds
    others = (low + high - x[half:], torch.full_like(x[half:], low))
    first = evidence.logits(x, mode)[:half]
    return half > 0 and any(differ(first, evidence.logits(torch.cat([x[:half], o]), mode)[:half]) for o in others)


def _with_rng(evidence: Evidence, x: Image, seed: int) -> Tensor:
    torch.manual_seed(seed)  # `evaluating` puts the random state back after each pass: without this all would agree
    return evidence.logits(x, "train")


def _cuda(x: Image) -> list[int]:
    return [x.device.index] if x.device.type == "cuda" else []
