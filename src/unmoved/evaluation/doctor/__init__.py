"""Checks of whether a robust accuracy can be believed, each for one reason not to."""
