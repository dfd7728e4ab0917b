"""Check that the model has a gradient, that it is finite and not zero, and that it is the slope of the loss."""

from __future__ import annotations

from dataclasses import replace

import torch

from unmoved.core.batch import PerSample
from unmoved.evaluation.doctor.confidence import grade
from unmoved.evaluation.doctor.evidence import Evidence
from unmoved.evaluation.doctor.finding import DO_NOT_BELIEVE, LOOK_CLOSER, Finding
from unmoved.evaluation.doctor.searches import without_gradients
from unmoved.terms import CE, Margin
from unmoved.terms.margin import margin

# Shares of points whose gradient is not finite: none in honest models. A single logit that is not finite is a fault.
BAD_WRONG = 0.02
# Shares of samples whose whole gradient is exactly zero: none in honest models; no gradient attack can move such
# a sample.
ZERO_CLOSER, ZERO_WRONG = 0.02, 0.1
# Finite differences along the steepest pixels agree with the gradient to 1 % in honest networks (median 0.02 %).
STEP, PIXELS, DISAGREES = 1e-3, 4, 0.5
SLOPE_CLOSER, SLOPE_WRONG = 0.1, 0.25
AUDIBLE = 50  # a difference of logits counts from this many times their float32 rounding on


def existing(evidence: Evidence) -> Finding | None:
    """Find a model without any gradient."""
    if len(evidence.right) == 0 or evidence.has_gradient:
        return None
    return Finding(
        "no gradient",
        DO_NOT_BELIEVE,
        "the gradient of the loss over the image does not exist: the model detaches its input or compares it",
        "no gradient attack can move; an accuracy under them measures nothing",
        without_gradients(evidence),
    )


def finite(evidence: Evidence) -> Finding | None:
    """Find NaN or infinity in logits or gradients, at the images, at random points of the balls and after PGD."""
    batches = [evidence.batch, evidence.started, replace(evidence.right, x=evidence.weak.x_adv)]
    bad_logits = sum(int((~evidence.logits(b.x).isfinite().all(dim=1)).sum()) for b in batches if len(b))
    bad_gradients = 0
    for batch in batches:
        found = evidence.gradient(batch, CE("adv")) if len(batch) and evidence.has_gradient else None
        bad_gradients += 0 if found is None else int((~found[1].isfinite().flatten(1).all(dim=1)).sum())
    if bad_logits + bad_gradients == 0:
        return None
    points = sum(map(len, batches))
    return Finding(
        "not finite",
        DO_NOT_BELIEVE if bad_logits else grade(bad_gradients, points, 0.0, BAD_WRONG) or LOOK_CLOSER,
        f"of {points} points looked at, {bad_logits} have logits and {bad_gradients} have gradients "
        "that are NaN or infinite",
        "the sign of NaN is a step of zero: the attack stalls there and the sample counts as robust",
        "find the operation (a root or logarithm at 0, a division by a norm) and bound it away from there",
    )


def vanishing(evidence: Evidence) -> Finding | None:
    """Find gradients that are exactly zero: of the margin (flat layers) or of cross-entropy (saturated logits)."""
    if not evidence.has_gradient:
        return None
    counts = []
    for loss in (CE("adv"), Margin("adv")):
        found = evidence.gradient(evidence.started, loss)
        counts.append(0 if found is None else int((found[1] == 0).flatten(1).all(dim=1).sum()))
    of_ce, of_margin = counts
    right = len(evidence.right)
    measured = (
        f"at random points of the ball {of_ce} of {right} samples have an exactly zero gradient of cross-entropy, "
        f"{of_margin} of the margin"
    )
    flat = grade(of_margin, right, ZERO_CLOSER, ZERO_WRONG)
    if flat is not None:
        return Finding(
            "zero gradients",
            flat,
            measured,
            "the model is flat there (rounding, thresholds, dead units): gradient attacks stay where they start",
            without_gradients(evidence),
        )
    saturated = grade(of_ce, right, ZERO_CLOSER, ZERO_WRONG)
    if saturated is None:
        return None
    return Finding(
        "saturated logits",
        saturated,
        measured,
        "the logits are so large that the softmax rounds to 1 and cross-entropy has no slope in float32; an attack on "
        "it stalls although the margin still has a gradient",
        "choose settings by an attack on the margin or DLR, which no scaling of the logits hides, as the verdict's are"
        if evidence.by_autoattack
        else "attack the margin or DLR, which no scaling of the logits hides (APGD with dlr, AutoAttack)",
    )


def honest_slope(evidence: Evidence) -> Finding | None:
    """Find gradients that are not the slope of the margin, by finite differences along the steepest pixels."""
    found = (
        evidence.gradient(evidence.started, Margin("adv")) if evidence.has_gradient and not evidence.is_random else None
    )
    if found is None:
        return None
    gradient, start = found[1].flatten(1), evidence.started
    # Few pixels and a short step: a rounded input then mostly does not move at all, while its replaced gradient says
    # that it does. Along all pixels, enough of them would cross an edge to imitate the slope.
    top = gradient.abs().topk(min(PIXELS, gradient.shape[1]), dim=1).indices
    direction = torch.zeros_like(gradient).scatter_(1, top, gradient.gather(1, top).sign())
    predicted = (gradient * direction).sum(dim=1)
    move = STEP * direction.reshape(start.x.shape)
    seen = (_margin(evidence, start.x + move) - _margin(evidence, start.x - move)) / (2 * STEP)
    larger = torch.maximum(seen.abs(), predicted.abs())
    rounding = torch.finfo(evidence.clean.dtype).eps * evidence.clean.abs().amax()
    audible = (larger * 2 * STEP > AUDIBLE * rounding) & (predicted != 0)
    if not audible.any():
        return None
    wrong = (seen - predicted).abs()[audible] > DISAGREES * larger[audible]
    found_grade = grade(int(wrong.sum()), len(wrong), SLOPE_CLOSER, SLOPE_WRONG)
    if found_grade is None:
        return None
    return Finding(
        "wrong gradients",
        found_grade,
        f"for {int(wrong.sum())} of {len(wrong)} samples the gradient and the measured slope of the margin differ by "
        f"more than half, {STEP:g} along the {PIXELS} steepest pixels",
        "the backward pass belongs to another function than the forward pass (straight-through rounding, a replaced "
        "gradient), or the function jumps: the attack climbs something else than the model",
        without_gradients(evidence),
    )


def _margin(evidence: Evidence, x: torch.Tensor) -> PerSample:
    return margin(evidence.logits(x), evidence.right.y)
