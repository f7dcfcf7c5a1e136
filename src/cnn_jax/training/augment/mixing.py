"""Mixtures of pairs of images."""

import math

import jax
import jax.numpy as jnp

from cnn_jax.training.augment.arithmetic import per_image, random_below, to_uint8
from cnn_jax.training.augment.boxes import Boxes, pixels_in


def mixup(images: jax.Array, others: jax.Array, uniform: jax.Array, alpha: float) -> tuple[jax.Array, jax.Array]:
    """Blend each image with another, with weights from Beta(alpha, alpha): https://arxiv.org/abs/1710.09412.

    The paper draws one weight for a batch; here each image has its own.

    Args:
        images: uint8 ``[B, H, W, C]``.
        others: uint8 ``[B, H, W, C]``.
        uniform: random numbers ``[B, 2]``.
        alpha: positive.

    Returns:
        ``weight * images + (1 - weight) * others``, rounded to uint8 ``[B, H, W, C]``, and the weight, float32 ``[B]``.
    """
    weight = symmetric_beta(uniform, alpha)
    factor = per_image(weight)
    return to_uint8(factor * images.astype(jnp.float32) + (1 - factor) * others.astype(jnp.float32)), weight


def cutmix(images: jax.Array, others: jax.Array, uniform: jax.Array, alpha: float) -> tuple[jax.Array, jax.Array]:
    """Replace a rectangle in each image by that of another: https://arxiv.org/abs/1905.04899.

    The rectangle has the image's ratio of height and width. Its center is uniform in the image, and its area is
    a fraction of the image's from Beta(alpha, alpha), less what is outside the image. The paper draws one rectangle for
    a batch; here each image has its own.

    Args:
        images: uint8 ``[B, H, W, C]``.
        others: uint8 ``[B, H, W, C]``.
        uniform: random numbers ``[B, 4]``.
        alpha: positive.

    Returns:
        uint8 ``[B, H, W, C]``, and the exact fraction of pixels of ``images`` in it, float32 ``[B]``.
    """
    height, width = images.shape[1:3]
    half_side = 0.5 * jnp.sqrt(1 - symmetric_beta(uniform[:, :2], alpha))

    def cut(size: int, uniform: jax.Array) -> tuple[jax.Array, jax.Array]:
        center = random_below(uniform, jnp.full(len(images), size, jnp.int32))
        half = (half_side * size).astype(jnp.int32)
        start = jnp.maximum(center - half, 0)
        return start, jnp.minimum(center + half, size) - start

    top, box_height = cut(height, uniform[:, 2])
    left, box_width = cut(width, uniform[:, 3])
    inside = pixels_in(Boxes(top, left, box_height, box_width), images.shape)
    weight = 1 - (box_height * box_width).astype(jnp.float32) / (height * width)
    return jnp.where(inside, others, images), weight


def symmetric_beta(uniform: jax.Array, alpha: float) -> jax.Array:
    """Numbers from Beta(alpha, alpha), in [0, 1]. Random numbers ``[B, 2]`` to float32 ``[B]``.

    From a number T of Student's t-distribution with ``2 alpha`` degrees of freedom, which Bailey's polar method makes
    of two uniform ones: ``(1 + T / sqrt(2 alpha + T ** 2)) / 2`` (Devroye, "Random variate generation in one line of
    code", 1996: https://doi.org/10.1145/256562.256623). Unlike ``jax.random.beta``, it has no loop.
    """
    log_power = jnp.log(uniform[:, 0]) / alpha
    cosine = jnp.cos(2 * math.pi * uniform[:, 1])
    scaled = -jnp.expm1(log_power) * jnp.square(cosine)
    # T ** 2 / (2 alpha + T ** 2), where T ** 2 = 2 alpha scaled / power
    root = jnp.sqrt(scaled / jnp.maximum(jnp.exp(log_power) + scaled, jnp.finfo(jnp.float32).tiny))
    return 0.5 * (1 + jnp.sign(cosine) * root)
