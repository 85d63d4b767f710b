"""The worker side of training. Start with worker, trainer, objectives, optim, zero, checkpoint."""
