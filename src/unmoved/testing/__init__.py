"""Check that a term, attack or defense keeps its contract, whether it is one of ours or your own.

    from unmoved.testing import check_term
    check_term(my_lab.Entropy())

    from unmoved.testing import default_case, without_case
    without_case(my_lab.terms, [my_lab.terms.Entropy(floor=2.0)])      # exports without a case yet, by name
    default_case(my_lab.terms.Other, num_classes=5)                    # one made from its constructor

Each check raises `ExamFailed` with the property that does not hold; returning means that all do.
"""

from unmoved.testing.attacks import check_attack
from unmoved.testing.cases import balls_of, default_case, missing, without_case
from unmoved.testing.defenses import check_defense
from unmoved.testing.fixtures import ExamFailed
from unmoved.testing.terms import check_term

__all__ = [
    "ExamFailed",
    "balls_of",
    "check_attack",
    "check_defense",
    "check_term",
    "default_case",
    "missing",
    "without_case",
]
