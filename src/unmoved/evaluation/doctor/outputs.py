"""Check a model's outputs for signs of trouble: training mode, randomness, dependence on the batch, probabilities."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.dropout import _DropoutNd

from unmoved.core.batch import Image
from unmoved.evaluation.doctor.evidence import PASSES, Evidence, differ
from unmoved.evaluation.doctor.finding import DO_NOT_BELIEVE, LOOK_CLOSER, NOTE, Finding

SUMS_TO_ONE = 1e-3  # half-precision probabilities sum to 1 within this; logits of many samples do not by chance


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
    by_rand = evidence.reported is not None and evidence.reported.by_rand
    return Finding(
        "randomness",
        NOTE if by_rand else DO_NOT_BELIEVE,
        f"in evaluation mode {PASSES} passes over the same {len(evidence.batch)} images do not agree",
        "each gradient is that of another draw, so an attack that takes one gradient a step wanders; and one lucky "
        "draw counts as robust",
        "say beside the number that it is the accuracy of the mean of many draws"
        if by_rand
        else 'average gradients over draws (EOT): AutoAttack(threat, version="rand"); report the accuracy over many '
        "draws",
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
