"""Averages of the weights along a training: what is validated, kept and judged in place of the last weights."""

from unmoved.training.averaging import AVERAGES, EMA, SWA, Average, Averaging, none

__all__ = ["AVERAGES", "Average", "Averaging", "EMA", "SWA", "none"]
