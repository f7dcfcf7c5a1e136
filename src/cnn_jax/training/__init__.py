"""The training state, the training step and loop, and inference."""
