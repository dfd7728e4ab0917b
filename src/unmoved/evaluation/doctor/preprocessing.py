"""Check that images reach the model as it expects them: normalised once, in range, with the right channels and axes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

from torch import Tensor, nn

from unmoved.core.batch import Image
from unmoved.core.errors import UnmovedError
from unmoved.evaluation.doctor.confidence import grade_of_gain
from unmoved.evaluation.doctor.evidence import Evidence
from unmoved.evaluation.doctor.finding import Finding

# Accuracy gained by transforming the images: at most 3 points for honest digits and MNIST models, tens if one was due.
GAIN_CLOSER, GAIN_WRONG = 0.1, 0.2
Transform = Callable[[Image], Image]


def normalisation(evidence: Evidence) -> Finding | None:
    """Find a clean accuracy that jumps when the images are normalised, un-normalised or rescaled first."""
    best = _best(evidence, list(_rescaled(evidence.model, evidence.batch.x)))
    if best is None:
        return None
    found, measured = best
    return Finding(
        "normalisation",
        found,
        measured,
        "the model seems to be made for pixels of another scale; what is attacked here is another function than the "
        "one that was trained, and eps means something else",
        "put exactly one normalisation inside the model (unmoved.models.normalized) and hand over images in [0, 1]",
    )


def arrangement(evidence: Evidence) -> Finding | None:
    """Find a clean accuracy that jumps when the images are inverted, transposed, or their channels are reversed."""
    best = _best(evidence, list(_rearranged(evidence.batch.x, evidence.threat.bounds)))
    if best is None:
        return None
    found, measured = best
    return Finding(
        "other images",
        found,
        measured,
        "the model was trained on images that were read in another way; the accuracy here is about images that it was "
        "never made for",
        "read the images as they were read in training, or undo the difference in the model's first layer",
    )


def _best(evidence: Evidence, transforms: list[tuple[str, Transform]]) -> tuple[str, str] | None:
    """Return the grade of the transform that gains most, and its gain in words; None if none gains."""
    if evidence.is_random:
        return None
    x, y = evidence.batch.x, evidence.batch.y
    right = evidence.clean.argmax(dim=1) == y
    best: tuple[int, str, str, int] | None = None
    for name, transform in transforms:
        try:
            out = evidence.logits(transform(x))
        except (AssertionError, UnmovedError, ValueError, RuntimeError):
            continue  # a model that refuses such pixels was not made for them
        if not out.isfinite().all():
            continue
        other = out.argmax(dim=1) == y
        gained, lost = int((other & ~right).sum()), int((right & ~other).sum())
        found = grade_of_gain(gained, lost, len(y), GAIN_CLOSER, GAIN_WRONG, tries=len(transforms))
        if found is not None and (best is None or gained - lost > best[0]):
            best = gained - lost, found, name, int(other.sum())
    if best is None:
        return None
    _, found, name, count = best
    measured = f"{int(right.sum())} of {len(y)} samples are right as the images are, and {count} after {name}"
    return found, measured


def _rescaled(model: nn.Module, x: Image) -> Iterator[tuple[str, Transform]]:
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


def _rearranged(x: Image, bounds: tuple[float, float]) -> Iterator[tuple[str, Transform]]:
    """List the transforms that would undo another way of reading images."""
    yield "inverting them (dark for light?)", lambda x: sum(bounds) - x
    if x.shape[2] == x.shape[3]:
        yield "swapping rows and columns (transposed?)", lambda x: x.transpose(2, 3).contiguous()
    if x.shape[1] == 3:
        yield "reversing the channels (BGR for RGB?)", lambda x: x.flip(1)


def _normalised(x: Image, mean: Tensor, std: Tensor) -> Image:
    return (x - mean.reshape(-1, 1, 1)) / std.reshape(-1, 1, 1)


def _restored(x: Image, mean: Tensor, std: Tensor) -> Image:
    return x * std.reshape(-1, 1, 1) + mean.reshape(-1, 1, 1)
