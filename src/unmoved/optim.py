"""torch's optimizers and schedules as values: what is named in a recipe and handed to the loop."""

from unmoved.training.optim import OPTIMIZERS, SCHEDULES, SGD, Adam, Constant, Cosine, Groups, MultiStep, OneCycle

__all__ = ["Adam", "Constant", "Cosine", "Groups", "MultiStep", "OPTIMIZERS", "OneCycle", "SCHEDULES", "SGD"]
