"""What the doctor says of the seeds of a recipe, read from the files that `unmoved doctor` wrote."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from unmoved.runs.evaluated import Judged

GRADES = DO_NOT_BELIEVE, LOOK_CLOSER, NOTE = "do not believe", "look closer", "note"


class Opinion(NamedTuple):
    """What the doctor says of a recipe.

    Attributes:
        grade: the worst over the seeds; "" where nothing objects, or nobody looked.
        said: the sentences to put beside the number, each with the seeds that it is about.
        findings: every finding, the gravest first: check, grade, why, do, and measured as (seed, words) each.
        unseen: the runs at which nobody looked.
    """

    grade: str
    said: list[tuple[str, list[int]]]
    findings: list[dict[str, Any]]
    unseen: list[Judged]


def opinion(runs: Sequence[Judged]) -> Opinion:
    """The findings of all seeds together; what was found alike at several seeds stands once."""
    cards: dict[tuple[str, ...], dict[str, Any]] = {}
    by_grade: dict[str, dict[str, list[int]]] = {grade: {} for grade in GRADES}
    for run in runs:
        findings = run.doctor["findings"] if run.doctor is not None else []
        for found in findings:
            key = tuple(found[name] for name in ("grade", "check", "why", "do"))
            cards.setdefault(key, {**found, "measured": []})["measured"].append((run.seed, found["measured"]))
        if run.doctor is not None and findings:
            grade = min((found["grade"] for found in findings), key=GRADES.index)
            sentence = run.doctor.get("sentence") or _sentence(findings, grade)
            by_grade[grade].setdefault(str(sentence), []).append(run.seed)
    grade = next((grade for grade in GRADES if by_grade[grade]), "")
    said = list(by_grade[grade].items()) if grade in (DO_NOT_BELIEVE, LOOK_CLOSER) else []
    ordered = sorted(cards.values(), key=lambda card: GRADES.index(card["grade"]))
    return Opinion(grade, said, ordered, [run for run in runs if run.doctor is None])


def _sentence(findings: Sequence[Mapping[str, str]], grade: str) -> str:
    """In place of a doctor's sentence that is missing."""
    opening = "Do not believe this number" if grade == DO_NOT_BELIEVE else "Look closer at this number"
    return f"{opening}: {', '.join(dict.fromkeys(f['check'] for f in findings if f['grade'] == grade))}."
