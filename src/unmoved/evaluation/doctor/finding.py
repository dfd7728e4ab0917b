"""Define a finding: one objection to a robust accuracy, with a grade that says how much it weighs."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from unmoved.core.errors import require_choice

DO_NOT_BELIEVE, LOOK_CLOSER, NOTE = "do not believe", "look closer", "note"
GRADES = (DO_NOT_BELIEVE, LOOK_CLOSER, NOTE)


@dataclass(frozen=True)
class Finding:
    """One objection to a robust accuracy.

    Attributes:
        check: what was checked, in a few words.
        grade: ``"do not believe"``, ``"look closer"`` or ``"note"``.
        measured: what was measured, with its numbers.
        why: why it matters.
        do: what to do about it.

    Raises:
        UnmovedError: an unknown grade.
    """

    check: str
    grade: str
    measured: str
    why: str
    do: str

    def __post_init__(self) -> None:
        require_choice("Finding.grade", self.grade, GRADES)


def summary(findings: Iterable[Finding]) -> str:
    """Return the sentence to print beside the number: the checks of the gravest grade; empty for notes alone."""
    said = list(findings)
    for grade, opening in ((DO_NOT_BELIEVE, "Do not believe this number"), (LOOK_CLOSER, "Look closer at this number")):
        checks = dict.fromkeys(finding.check for finding in said if finding.grade == grade)
        if checks:
            return f"{opening}: {', '.join(checks)}."
    return ""
