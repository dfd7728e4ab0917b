"""Train a model: one step, the loop, its state, averages of weights, optimizers, several processes."""
