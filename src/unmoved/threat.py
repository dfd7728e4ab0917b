"""Which inputs an attacker may choose. The same verbs as `unmoved.weights` has for weights: steepest, project."""

from unmoved.core.threat import BEYOND, NEWTON_STEPS, NORMS, ThreatModel, bounds_of, require_threat

__all__ = ["BEYOND", "NEWTON_STEPS", "NORMS", "ThreatModel", "bounds_of", "require_threat"]
