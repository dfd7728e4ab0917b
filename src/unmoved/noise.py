"""Counter-based random numbers: functions of seed, stream, step, identity and pixel."""

from unmoved.core.noise import normal, uniform

__all__ = ["normal", "uniform"]
