"""Choose at which weights the gradient is taken: a defense owns zero_grad, every backward and the step."""

from unmoved.defenses.apd import APD
from unmoved.defenses.asam import ASAM
from unmoved.defenses.awp import AWP
from unmoved.defenses.plain import Plain
from unmoved.defenses.sam import SAM

__all__ = ["APD", "ASAM", "AWP", "SAM", "Plain"]
