"""Arithmetic on random numbers and on pixels that several operations share."""

import jax
import jax.numpy as jnp


def between(uniform: jax.Array, low: float, high: float) -> jax.Array:
    """Scale numbers in [0, 1) to [low, high)."""
    return low + (high - low) * uniform


def random_below(uniform: jax.Array, count: jax.Array) -> jax.Array:
    """Convert numbers in [0, 1) to integers from 0 to ``count - 1``, int32 as ``count``."""
    # The product may be rounded up to count.
    return jnp.minimum((uniform * count.astype(jnp.float32)).astype(jnp.int32), count - 1)


def per_image(values: jax.Array) -> jax.Array:
    """``[B]`` to ``[B, 1, 1, 1]``."""
    return values.reshape(-1, 1, 1, 1)


def to_uint8(pixels: jax.Array) -> jax.Array:
    """Round to the nearest integer in [0, 255]."""
    return jnp.round(jnp.clip(pixels, 0, 255)).astype(jnp.uint8)
