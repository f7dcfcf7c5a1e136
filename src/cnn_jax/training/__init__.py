"""The state of training, and what changes it."""
