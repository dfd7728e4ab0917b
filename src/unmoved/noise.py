"""Counter-based random numbers: noise is a function of (seed, stream, step, sample identity, pixel) and nothing else."""

from unmoved.core.noise import normal, uniform

__all__ = ["normal", "uniform"]
