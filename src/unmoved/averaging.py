"""Average the weights along a training (EMA, SWA), to validate, keep and evaluate in place of the last weights."""

from unmoved.training.averaging import AVERAGES, EMA, SWA, Average, Averaging, none

__all__ = ["AVERAGES", "Average", "Averaging", "EMA", "SWA", "none"]
