"""The engine: step, trainer, optimiser, checkpoints, distribution, metrics."""
