"""What an attacker may try: each attack proposes one image per sample and leaves the caller as it found it."""

from unmoved.attacks.apgd import APGD
from unmoved.attacks.iaat import IAAT
from unmoved.attacks.pgd import FGSM, PGD
from unmoved.attacks.stopping import Friendly, Sensible, StoppingRule

__all__ = ["APGD", "FGSM", "IAAT", "PGD", "Friendly", "Sensible", "StoppingRule"]
