"""Where a model's weights come from: the hub, checkpoints as they are published, recipes of random numbers."""
