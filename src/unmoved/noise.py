"""Draw random numbers that depend on seed, stream, step, sample identity and pixel, and on nothing else."""

from unmoved.core.noise import normal, uniform

__all__ = ["normal", "uniform"]
