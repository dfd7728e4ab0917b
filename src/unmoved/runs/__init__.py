"""Train, evaluate and examine one run from its recipe, in a folder of its own; group the runs of one recipe."""
