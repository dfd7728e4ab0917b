"""Compute what is maximised and minimised: one number per sample; larger is worse for the defender."""

from unmoved.terms.cross_entropy import CE
from unmoved.terms.global_probability import GlobalProbability
from unmoved.terms.kl import KL, TRADES
from unmoved.terms.margin import DLR, Margin, TargetedDLR, TargetedMargin
from unmoved.terms.mart import MART, BoostedCE, MisclassifiedKL
from unmoved.terms.sum import Sum
from unmoved.terms.wrong_classes import DRSL, PRSL, ComplementEntropy, GuidedComplementEntropy, LogitSqueeze

__all__ = [
    "CE",
    "DLR",
    "DRSL",
    "KL",
    "MART",
    "PRSL",
    "TRADES",
    "BoostedCE",
    "ComplementEntropy",
    "GlobalProbability",
    "GuidedComplementEntropy",
    "LogitSqueeze",
    "Margin",
    "MisclassifiedKL",
    "Sum",
    "TargetedDLR",
    "TargetedMargin",
]
