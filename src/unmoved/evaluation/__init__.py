"""Evaluate a model under attacks: outcomes per sample, and whether the figures can be believed."""
