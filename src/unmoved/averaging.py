"""Average the weights over a training (EMA, SWA), to validate, save and evaluate the average instead of the weights."""

from unmoved.training.averaging import AVERAGES, EMA, SWA, Average, Averaging, none

__all__ = ["AVERAGES", "Average", "Averaging", "EMA", "SWA", "none"]
