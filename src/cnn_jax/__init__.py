"""Image-classifying CNNs in JAX and Flax."""
