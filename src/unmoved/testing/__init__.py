"""The exam that every exported method sits, and strangers may sit too.

    from unmoved.testing import check_term
    check_term(my_lab.Entropy())

Each check raises `ExamFailed` with the property that does not hold; returning means that all do.
"""

from unmoved.testing.attacks import check_attack
from unmoved.testing.defenses import check_defense
from unmoved.testing.fixtures import ExamFailed
from unmoved.testing.terms import check_term

__all__ = ["ExamFailed", "check_attack", "check_defense", "check_term"]
