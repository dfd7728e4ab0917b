"""What an attacker may try: each attack proposes one image per sample and leaves the caller as it found it."""

from unmoved.attacks.apgd import APGD
from unmoved.attacks.ensembles import AutoAttack, Quick
from unmoved.attacks.fab import FAB
from unmoved.attacks.iaat import IAAT
from unmoved.attacks.pgd import FGSM, PGD
from unmoved.attacks.square import Square
from unmoved.attacks.stopping import Friendly, Sensible, StoppingRule

__all__ = [
    "APGD",
    "FAB",
    "FGSM",
    "IAAT",
    "PGD",
    "AutoAttack",
    "Friendly",
    "Quick",
    "Sensible",
    "Square",
    "StoppingRule",
]
