"""The checks of the doctor: each looks for one reason not to believe a robust accuracy."""

from unmoved.evaluation.doctor.evidence import Case
from unmoved.evaluation.doctor.finding import DO_NOT_BELIEVE, GRADES, LOOK_CLOSER, NOTE, Finding

__all__ = ["DO_NOT_BELIEVE", "GRADES", "LOOK_CLOSER", "NOTE", "Case", "Finding"]
