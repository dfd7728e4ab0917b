"""At which weights the gradient is taken, and the step: a defense owns zero_grad, every backward and the step."""

from unmoved.defenses.awp import AWP
from unmoved.defenses.plain import Plain
from unmoved.defenses.sam import SAM

__all__ = ["AWP", "SAM", "Plain"]
