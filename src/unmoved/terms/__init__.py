"""What is maximised and minimised: each term gives one number per sample, larger is worse for the defender."""

from unmoved.terms.cross_entropy import CE
from unmoved.terms.kl import KL, TRADES
from unmoved.terms.margin import DLR, Margin
from unmoved.terms.mart import MART, BoostedCE, MisclassifiedKL
from unmoved.terms.sum import Sum

__all__ = ["CE", "DLR", "KL", "MART", "TRADES", "BoostedCE", "Margin", "MisclassifiedKL", "Sum"]
