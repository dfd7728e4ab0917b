"""The exam that every exported method sits, and strangers may sit too.

    from unmoved.testing import check_term
    check_term(my_lab.Entropy())

Each check raises `ExamFailed` with the property that does not hold; returning means that all do.
"""

from unmoved.testing.attack_exam import check_attack
from unmoved.testing.defense_exam import check_defense
from unmoved.testing.subjects import ExamFailed
from unmoved.testing.term_exam import check_term

__all__ = ["ExamFailed", "check_attack", "check_defense", "check_term"]
