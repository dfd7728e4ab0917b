"""Attack models: propose one perturbed image per sample, and leave the model and the random state as they were."""

from unmoved.attacks.apgd import APGD
from unmoved.attacks.cw import CW
from unmoved.attacks.deepfool import DeepFool
from unmoved.attacks.ensembles import AutoAttack, Quick
from unmoved.attacks.fab import FAB
from unmoved.attacks.fmn import FMN
from unmoved.attacks.hop_skip_jump import HopSkipJump
from unmoved.attacks.iaat import IAAT
from unmoved.attacks.n_fgsm import NFGSM
from unmoved.attacks.pgd import FGSM, PGD
from unmoved.attacks.prior_fgsm import PriorFGSM
from unmoved.attacks.spsa import SPSA
from unmoved.attacks.square import Square
from unmoved.attacks.stopping import Friendly, Sensible, StoppingRule
from unmoved.attacks.transfer import Transfer

__all__ = [
    "APGD",
    "CW",
    "FAB",
    "FGSM",
    "FMN",
    "IAAT",
    "NFGSM",
    "PGD",
    "PriorFGSM",
    "SPSA",
    "AutoAttack",
    "DeepFool",
    "Friendly",
    "HopSkipJump",
    "Quick",
    "Sensible",
    "Square",
    "StoppingRule",
    "Transfer",
]
