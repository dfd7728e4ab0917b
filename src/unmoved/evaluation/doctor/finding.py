"""One objection to a robust accuracy, and how much it weighs."""

from __future__ import annotations

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
