"""Exports: the weights of an evaluated run in a folder that others can read, with the evidence for its figures."""
