"""Training from a config to a run directory, and loading the trained network from it."""
