"""Define which perturbed images an attacker may choose, and the steps and projections within that set."""

from unmoved.core.threat import BEYOND, NEWTON_STEPS, NORMS, ThreatModel, bounds_of, require_threat

__all__ = ["BEYOND", "NEWTON_STEPS", "NORMS", "ThreatModel", "bounds_of", "require_threat"]
