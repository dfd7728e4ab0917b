"""Compare attacks of growing strength: stronger ones should add little, and weaker ones never win."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from unmoved.attacks import PGD
from unmoved.core.batch import Image
from unmoved.core.protocols import Term
from unmoved.core.threat import ThreatModel
from unmoved.evaluation.doctor.confidence import grade, lower
from unmoved.evaluation.doctor.evidence import (
    MORE_RESTARTS,
    QUERIES,
    STRONG_STEPS,
    TARGETS,
    WEAK_STEPS,
    AttackResult,
    Evidence,
)
from unmoved.evaluation.doctor.finding import LOOK_CLOSER, NOTE, Finding
from unmoved.terms import CE, Margin

# Share that the margin loss breaks beyond cross-entropy at the same 20 steps. Honest TRADES and MART models lose up to
# 21 points of 100 here (their logits are small, and cross-entropy then pushes all classes at once), AT models up to 8.
LOSS_NOTE, LOSS_CLOSER, LOSS_WRONG = 0.1, 0.25, 0.35
# Share that APGD with restarts and targets breaks beyond PGD-20 with both losses: at most 8 points in honest models of
# digits.
SEARCH_CLOSER, SEARCH_WRONG = 0.1, 0.15
# Share that further restarts break beyond one: at most 4 points in honest models.
RESTARTS_CLOSER, RESTARTS_WRONG = 0.08, 0.15
# Share that a gradient-free attack breaks beyond all gradient attacks: 0 or 1 of 100 in honest models.
BLACK_CLOSER, BLACK_WRONG, BLACK_LEAST = 0.02, 0.05, 3
# Share that a gradient attack does not break in a ball that holds all images: none in honest models.
BOX_CLOSER, BOX_WRONG = 0.03, 0.1
# The share of the whole rise of the margin that comes after half of 100 equal steps: under 1 % in honest models. Many
# samples must show such a rise, since a single one can make a mean.
RISE_STEPS, RISE_CLOSER, RISE_WRONG = 100, 0.1, 0.3
RISING_CLOSER, RISING_WRONG = 0.1, 0.25
# Adversarial images lost to rounding: none in honest models unless eps is below the grid of 8 bits.
ROUND_CLOSER, ROUND_WRONG, ROUND_LEAST = 0.1, 0.5, 5


def other_loss(evidence: Evidence) -> Finding | None:
    """Find a margin loss that breaks far more than cross-entropy with the same steps."""
    return loss_gap(
        evidence.other_loss.count,
        len(evidence.right),
        f"PGD-{WEAK_STEPS} with cross-entropy leaves {len(evidence.weak.rest)} of {len(evidence.right)} samples; the "
        f"same steps on the margin break {evidence.other_loss.count} of these",
        evidence.by_autoattack,
    )


def loss_gap(count: int, right: int, measured: str, by_autoattack: bool) -> Finding | None:
    """Make the finding that ``count`` of ``right`` samples resist PGD with cross-entropy and not a stronger attack."""
    if lower(count, right) < LOSS_NOTE:
        return None
    return Finding(
        "PGD overrates",
        grade(count, right, LOSS_CLOSER, LOSS_WRONG) or NOTE,
        measured,
        "cross-entropy does not lead to the boundary here (a plateau of confidence, or logits drawn together): an "
        "accuracy under PGD alone says little about this model",
        "quote AutoAttack's figure, never PGD's; choose settings by an attack with a margin loss (APGD with dlr)"
        if by_autoattack
        else "quote the worst case over attacks with a margin loss (APGD with dlr, AutoAttack), never PGD alone",
    )


def stronger_search(evidence: Evidence) -> Finding | None:
    """Find that adaptive steps, restarts and targets break far more than plain PGD with both losses."""
    count = evidence.strong.count + evidence.scale * (evidence.restarts.count + evidence.targeted.count)
    found = grade(*evidence.looked_at(count), SEARCH_CLOSER, SEARCH_WRONG)
    if found is None:
        return None
    return Finding(
        "a stronger search wins",
        found,
        f"of {len(evidence.other_loss.rest)} samples that PGD-{WEAK_STEPS} left (cross-entropy, then the margin), "
        f"APGD-{STRONG_STEPS} with {1 + MORE_RESTARTS} restarts and {TARGETS} targets breaks about {count:.0f}",
        "where more search goes on finding adversarial images, the accuracy measured is that of the search, not of the "
        "model",
        "judge by a search adapted to the model as well"
        if evidence.by_autoattack
        else "judge by the strongest search at hand (unmoved evaluate --attacks standard) and by one adapted to the "
        "model",
    )


def more_restarts(evidence: Evidence) -> Finding | None:
    """Find that further restarts go on breaking samples."""
    found = grade(*evidence.looked_at(evidence.scale * evidence.restarts.count), RESTARTS_CLOSER, RESTARTS_WRONG)
    if found is None:
        return None
    return Finding(
        "restarts still matter",
        found,
        f"{MORE_RESTARTS} further restarts of APGD-{STRONG_STEPS} break {evidence.restarts.count} of "
        f"{len(evidence.restarts.batch)} samples that the first left",
        "the loss has many poor maxima, as where gradients are shattered: still more restarts would break still more",
        "raise the restarts until the accuracy stands still, and report that number",
    )


def still_rising(evidence: Evidence) -> Finding | None:
    """Find a loss that still rises after many steps."""
    batch = evidence.restarts.batch
    if not evidence.has_gradient or len(batch) == 0 or evidence.threat.norm == "l1":
        return None
    x_adv, top, trace = batch.x, None, []
    for _ in range(RISE_STEPS + 1):
        found = evidence.gradient(replace(batch, x=x_adv), Margin("adv"))
        if found is None:
            return None
        value, gradient = found
        top = value if top is None else torch.maximum(top, value)
        trace.append(top)
        step = 2.5 * evidence.threat.radius / WEAK_STEPS * evidence.threat.steepest(gradient)
        x_adv = evidence.threat.project(x_adv + step, batch.x)
    start, middle, end = trace[0], trace[RISE_STEPS // 2], trace[RISE_STEPS]
    first, half, last = (float(values.mean()) for values in (start, middle, end))
    share = (last - half) / max(last - first, 1e-12)
    rising = int(((end - middle) >= RISE_CLOSER * (end - start).clamp_min(1e-12)).sum())
    in_many = grade(rising, len(batch), RISING_CLOSER, RISING_WRONG)
    if share < RISE_CLOSER or in_many is None:
        return None
    return Finding(
        "loss still rising",
        in_many if share >= RISE_WRONG else LOOK_CLOSER,
        f"over {RISE_STEPS} steps on {len(batch)} samples the best margin went from {first:.3g} through {half:.3g} at "
        f"half time to {last:.3g}: {share:.0%} of the rise came in the second half, in {rising} of the samples",
        "an attack that has not converged underrates the attacker: noisy or misleading gradients make it crawl",
        "give the attack more steps until the loss stands still",
    )


def whole_box(evidence: Evidence) -> Finding | None:
    """Find a gradient attack that fails in a ball that holds all images, where replacing the image would succeed."""
    low, high = evidence.threat.bounds
    box = ThreatModel("linf", high - low, evidence.threat.bounds)
    loss: Term = (
        Margin("adv") if evidence.by_autoattack else CE("adv")
    )  # AutoAttack does not rest on cross-entropy alone
    attack = PGD(box, loss=loss, steps=WEAK_STEPS, start="none", keep="best", seed=evidence.seed)
    climbed = evidence.climb(attack, evidence.right)
    painted = torch.zeros_like(climbed.broken)
    for picture in _pictures(evidence):
        painted |= evidence.logits(picture.expand_as(evidence.right.x)).argmax(dim=1) != evidence.right.y
    missed = int((painted & ~climbed.broken).sum())
    found = grade(missed, len(evidence.right), BOX_CLOSER, BOX_WRONG)
    if found is None:
        return None
    return Finding(
        "fails at eps = 1",
        found,
        f"with the whole box of images allowed, PGD-{WEAK_STEPS} still fails on {missed} of {len(evidence.right)} "
        "samples that painting the image grey, or as one of another class, does break",
        "at eps = 1 accuracy must fall to about 0; a gradient attack that does not get there does not follow the model",
        f"{without_gradients(evidence)}; distrust every eps",
    )


def _pictures(evidence: Evidence) -> list[Image]:
    """Return mid-grey, and the first right image of each class."""
    right = evidence.right
    firsts = [right.x[right.y == label][:1] for label in right.y.unique()]
    return [torch.full_like(right.x[:1], sum(evidence.threat.bounds) / 2), *firsts]


def black_box(evidence: Evidence) -> Finding | None:
    """Find that random search breaks samples that every gradient attack left robust."""
    who = f"Square with {QUERIES} queries, which sees no gradient,"
    return _beats_white_box(evidence, evidence.black_box, "black-box stronger", who)


def transfer(evidence: Evidence) -> Finding | None:
    """Find that images made for another model break samples that every gradient attack on this one left robust."""
    who = "PGD on the surrogate model, transferred,"
    return _beats_white_box(evidence, evidence.transferred, "transfer stronger", who)


def _beats_white_box(evidence: Evidence, search: AttackResult, check: str, who: str) -> Finding | None:
    found = beaten(search.count, *evidence.looked_at(evidence.scale * search.count))
    if found is None:
        return None
    measured = f"{who} breaks {search.count} of {len(search.batch)} samples that all gradient attacks left"
    return weaker_wins(check, found, measured)


def beaten(seen: int, count: float, n: float) -> str | None:
    """Grade the samples that only a weaker attack broke: ``seen`` of them, which stand for ``count`` of ``n``."""
    if seen == 0:
        return None
    return (grade(count, n, BLACK_CLOSER, BLACK_WRONG) or NOTE) if seen >= BLACK_LEAST else NOTE


def weaker_wins(check: str, found: str, measured: str) -> Finding:
    """Make the finding that an attack with less knowledge of the model does better."""
    return Finding(
        check,
        found,
        measured,
        "whoever sees gradients can do all that this attacker did: that they did not shows that the gradients mislead",
        "do not use gradient attacks alone here; raise the queries of Square, and look for the layer that masks",
    )


def without_gradients(evidence: Evidence) -> str:
    """Advise what to try where gradients mislead: more queries if a gradient-free attack has run, else to run one."""
    if evidence.reported is not None and evidence.reported.has_gradient_free:
        return "raise the queries of the attacks without gradients, or attack through a faithful smooth stand-in (BPDA)"
    return "attack without gradients (Square, SPSA) or through a faithful smooth stand-in (BPDA)"


def rounding(evidence: Evidence) -> Finding | None:
    """Find adversarial images that stop being adversarial in 8 bits."""
    searches: Sequence[AttackResult] = (
        evidence.weak,
        evidence.other_loss,
        evidence.strong,
    )  # the others stop at the boundary
    x_adv = torch.cat([s.x_adv[s.broken] for s in searches])
    y = torch.cat([s.batch.y[s.broken] for s in searches])
    if len(y) < ROUND_LEAST:
        return None
    lost = int((evidence.logits(_in_8_bits(x_adv, evidence.threat)).argmax(dim=1) == y).sum())
    found = grade(lost, len(y), ROUND_CLOSER, ROUND_WRONG)
    if found is None:
        return None
    return Finding(
        "undone by 8 bits",
        found,
        f"rounding to 256 levels turns {lost} of {len(y)} adversarial images back into correctly classified ones",
        "no image file holds these images; either eps is below the grid of stored images, or the model is so jagged "
        "that attacks find needles rather than regions",
        "round inside the attack, or say that images are real-valued; if eps is above 1/255, look for a jagged layer",
    )


def _in_8_bits(x: Image, threat: ThreatModel) -> Tensor:
    low, high = threat.bounds
    return ((x - low) * (255 / (high - low))).round() * ((high - low) / 255) + low
