"""Training: the loop, the optimizer, checkpoints, metrics and ranks."""
