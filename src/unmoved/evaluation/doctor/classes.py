"""Check that the model tells the classes apart, numbers them as the labels do, and loses none of them.

The checks use all samples of the table of outcomes if there is one, otherwise the samples of the examination.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import scipy

from unmoved.evaluation import outcomes
from unmoved.evaluation.doctor import lost_classes
from unmoved.evaluation.doctor.confidence import LEVEL, by_luck, grade, grade_of_gain, lower, upper
from unmoved.evaluation.doctor.evidence import Evidence
from unmoved.evaluation.doctor.finding import DO_NOT_BELIEVE, LOOK_CLOSER, NOTE, Finding
from unmoved.evaluation.doctor.lost_classes import LostClass

# Shares of the samples of other classes that a model predicts as one and the same class.
CONSTANT_CLOSER, CONSTANT_WRONG = 0.5, 0.75
# Upper bound of the accuracy, on a scale from chance (0) to a perfect model (1).
LUCK_CLOSER, LUCK_WRONG = 0.5, 0.25
# Accuracy gained by renumbering the classes: none in honest models, 2 / K if two classes are exchanged.
NAMES_CLOSER, NAMES_WRONG = 0.05, 0.15
MOST_NAMED = 5


@dataclass(frozen=True)
class Answers:
    """Hold labels, predictions of the clean images, and whether samples are robust in the worst case; all (n,)."""

    label: np.ndarray
    prediction: np.ndarray
    robust: np.ndarray

    @classmethod
    def of(cls, evidence: Evidence, *, attacked: bool = False) -> Answers:
        """Read the table, or the samples of the examination, whose robustness is computed only with ``attacked``."""
        if evidence.reported is not None:
            first = evidence.reported.table.drop_duplicates("index").sort_values("index")
            samples = evidence.reported.samples.sort_values("index")
            return cls(*(c.to_numpy() for c in (first["label"], first["clean_prediction"], samples[outcomes.WORST])))
        label, prediction = evidence.batch.y.cpu().numpy(), evidence.clean.argmax(dim=1).cpu().numpy()
        robust = label == prediction
        for search in (*evidence.white_box, evidence.black_box) if attacked else ():
            robust &= ~np.isin(evidence.batch.index.cpu(), search.batch.index[search.broken].cpu())
        return cls(label, prediction, robust)

    @property
    def right(self) -> np.ndarray:
        right: np.ndarray = self.label == self.prediction
        return right


def constant(evidence: Evidence) -> Finding | None:
    """Find a model that predicts one class whatever the image."""
    answers = Answers.of(evidence)
    always, n = int(answers.prediction[0]), len(answers.label)
    others = int((answers.label != always).sum())
    if (answers.prediction != always).any():
        return None
    found = grade(others, others, CONSTANT_CLOSER, CONSTANT_WRONG)
    if found is None:
        return None
    return Finding(
        "constant prediction",
        found,
        f"all {n} samples are predicted as {_name(evidence, always)}, though {others} of them are of other classes",
        "a constant is never changed by an attack: its robust accuracy is the share of one class, and no merit",
        "check that the weights were loaded, that training did not diverge, and how the images are normalised",
    )


def luck(evidence: Evidence) -> Finding | None:
    """Find an accuracy that is no better than chance: max(1 / K, share of the most frequent class).

    An accuracy below this share is only a note if the predictions depend on the labels: the model may have been
    trained for classes of equal weight.
    """
    if constant(evidence) is not None or names(evidence) is not None:
        return None
    answers, classes = Answers.of(evidence), evidence.clean.shape[1]
    n, right = len(answers.label), int(answers.right.sum())
    share, predicted = (np.bincount(of, minlength=classes) / n for of in (answers.label, answers.prediction))
    chance = max(1 / classes, float(share.max()))
    if by_luck(right, n, chance) <= 1 - LEVEL:
        return None
    least = max(1 / classes, lower(float(share.max()) * n, n))  # among few samples some class is always frequent
    reached = (upper(right, n) - least) / (1 - least)
    found = DO_NOT_BELIEVE if reached <= LUCK_WRONG else LOOK_CLOSER if reached <= LUCK_CLOSER else None
    if found is not None and by_luck(right, n, float((share * predicted).sum())) <= 1 - LEVEL:
        found = NOTE
    if found is None and right == 0:
        found = NOTE
    if found is None:
        return None
    return Finding(
        "no better than chance",
        found,
        f"{right} of {n} samples are right, and {chance:.1%} of them would be by chance (1 / {classes} classes, or the "
        f"most frequent class): at most {upper(right, n):.1%} by this n",
        "robust accuracy is at most clean accuracy: that of a model that knows nothing says nothing of attacks",
        "check the weights, the normalisation and the order of the classes",
    )


def names(evidence: Evidence) -> Finding | None:
    """Find predictions that are right under another numbering of the classes: all shifted, or some exchanged.

    The best numbering (the assignment of largest agreement, Kuhn 1955) is fitted on each half of the samples and scored
    on the other half; on the half that it was fitted to, it would gain by chance.
    """
    if constant(evidence) is not None:
        return None
    answers, classes = Answers.of(evidence), evidence.clean.shape[1]
    shifts = {shift: (answers.prediction + shift) % classes for shift in range(1, classes)}
    best: tuple[int, str, str] | None = None
    for shift, renamed in {**shifts, 0: _cross_fitted(answers, classes)}.items():
        other = renamed == answers.label
        gained, lost = int((other & ~answers.right).sum()), int((answers.right & ~other).sum())
        found = grade_of_gain(gained, lost, len(other), NAMES_CLOSER, NAMES_WRONG, tries=classes)
        if found is not None and (best is None or gained - lost > best[0]):
            how = _shifted(evidence, shift) if shift else _exchanged(evidence, answers, classes)
            best = gained - lost, found, f"{int(other.sum())} if {how}"
    if best is None:
        return None
    return Finding(
        "names of the classes",
        best[1],
        f"{int(answers.right.sum())} of {len(answers.label)} samples are right as they are labelled, and {best[2]}",
        "the labels number the classes in another order than the model was trained with: what is counted as an error, "
        "and attacked or not, has nothing to do with what the model knows",
        "put the classes of the data into the order of training (folders are often sorted by name, some labels begin "
        "at 1), or reorder the rows of the last layer",
    )


def lost_clean(evidence: Evidence) -> Finding | None:
    """Find classes that the model does not know: recall 0, or far below that of the others."""
    if constant(evidence) is not None or names(evidence) is not None:
        return None
    answers = Answers.of(evidence)
    return _lost(
        evidence,
        "class lost",
        lost_classes.lost_clean(answers.label, answers.right),
        "{} of {} samples of {} are right",
        "the mean over classes hides it: on this class there is nothing that an attack could take",
        "look whether training knew the class, by this name; report each class's accuracy",
    )


def lost_under_attack(evidence: Evidence) -> Finding | None:
    """Find classes of which nothing is left under attack, while the others hold."""
    answers = Answers.of(evidence, attacked=True)
    return _lost(
        evidence,
        "class lost under attack",
        lost_classes.lost_under_attack(answers.label, answers.right, answers.robust),
        "{} of {} samples of {} that are right clean are robust",
        "the mean over classes hides it: whoever relies on this class has no robustness at all",
        "report each class's robust accuracy, or the lowest of them; weigh the class up in training",
    )


def _lost(evidence: Evidence, check: str, lost: Sequence[LostClass], words: str, why: str, do: str) -> Finding | None:
    """Make the finding about lost classes, the gravest first; it quotes the others' bound for the first."""
    if not lost:
        return None
    said = [words.format(one.hits, one.n, _name(evidence, one.label)) for one in lost[:MOST_NAMED]]
    said += [f"and so on for {len(lost) - MOST_NAMED} more"] if len(lost) > MOST_NAMED else []
    return Finding(check, lost[0].grade, f"{', '.join(said)}; of the others at least {lost[0].others:.0%}", why, do)


def _cross_fitted(answers: Answers, classes: int) -> np.ndarray:
    """Rename the predictions of each half by the best assignment of the other half."""
    half = np.random.default_rng(0).permutation(len(answers.label)) % 2
    renamed = np.empty_like(answers.prediction)
    for side in (0, 1):
        renamed[half == side] = _assignment(answers, half != side, classes)[answers.prediction[half == side]]
    return renamed


def _assignment(answers: Answers, which: np.ndarray, classes: int) -> np.ndarray:
    """Return the one-to-one map from predictions to labels by which most samples are right; the identity in a tie."""
    together = 0.5 * np.eye(classes)
    np.add.at(together, (answers.prediction[which], answers.label[which]), 1)
    return np.asarray(scipy.optimize.linear_sum_assignment(together, maximize=True)[1])


def _shifted(evidence: Evidence, shift: int) -> str:
    return f"all classes are shifted by {shift}: the model's class 0 is labelled {_name(evidence, shift)}, and so on"


def _exchanged(evidence: Evidence, answers: Answers, classes: int) -> str:
    new = _assignment(answers, np.ones(len(answers.label), dtype=bool), classes)
    moved = [k for k in np.unique(answers.prediction) if new[k] != k]
    said = [f"the model's class {k} is labelled {_name(evidence, int(new[k]))}" for k in moved[:MOST_NAMED]]
    return ", ".join(said) + (", and so on" if len(moved) > MOST_NAMED else "")


def _name(evidence: Evidence, label: int) -> str:
    """Return the number of a class, with its name if it has one."""
    name = evidence.classes[label] if label < len(evidence.classes) else str(label)
    return f"class {label}" if name == str(label) else f"class {label} ({name})"
