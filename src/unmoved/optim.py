"""Describe torch's optimizers and learning-rate schedules as values, for recipes and for `unmoved.train`."""

from unmoved.training.optim import OPTIMIZERS, SCHEDULES, SGD, Adam, Constant, Cosine, Groups, MultiStep, OneCycle

__all__ = ["Adam", "Constant", "Cosine", "Groups", "MultiStep", "OPTIMIZERS", "OneCycle", "SCHEDULES", "SGD"]
