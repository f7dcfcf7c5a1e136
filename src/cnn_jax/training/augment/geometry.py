"""Mirrored and shifted images."""

import jax
import jax.numpy as jnp

from cnn_jax.training.augment.arithmetic import per_image, random_below


def mirror_where(condition: jax.Array, images: jax.Array) -> jax.Array:
    """Mirror images ``[B, H, W, C]`` left to right where ``condition``, bool ``[B]``, is true."""
    return jnp.where(per_image(condition), images[:, :, ::-1], images)


def random_flips(uniform: jax.Array) -> jax.Array:
    """Which images to mirror: each with probability 1/2. Random numbers ``[B, 1]`` to bool ``[B]``."""
    return uniform[:, 0] < 0.5


def alternating_flips(images: jax.Array, epoch: jax.Array) -> jax.Array:
    """Which images to mirror: about half in epoch 0, each image in every other epoch.

    So any two consecutive epochs show every image both ways, which random flips do for half of the images
    (https://arxiv.org/abs/2404.00498). A bit of a hash of the pixels decides which half is first, as a batch does not
    tell which image is which: copies of an image are mirrored together, and the choice is the same for all seeds.

    Args:
        images: uint8 ``[B, H, W, C]`` before any random change.
        epoch: int32 scalar, counted from 0.

    Returns:
        bool ``[B]``.
    """
    pixels = images.reshape(len(images), -1).astype(jnp.uint32)
    # The sum modulo 2**32 of the pixels, each times a scrambled index. All of them influence the top bit.
    factors = (jax.lax.iota(jnp.uint32, pixels.shape[1]) + 1) * jnp.uint32(0x9E3779B1)
    factors = (factors ^ (factors >> 15)) * jnp.uint32(0x85EBCA77)
    factors = factors ^ (factors >> 13)
    hashes = jnp.sum(pixels * factors.reshape(1, -1), axis=1, dtype=jnp.uint32)
    return (hashes >> 31).astype(jnp.int32) != epoch % 2


def random_shift(images: jax.Array, uniform: jax.Array, pixels: int) -> jax.Array:
    """Shift images by up to ``pixels`` in each direction: a random crop of the image padded by reflection.

    All ``(2 pixels + 1) ** 2`` shifts are equally probable. As in airbench, https://arxiv.org/abs/2404.00498.

    Args:
        images: uint8 ``[B, H, W, C]``.
        uniform: random numbers ``[B, 2]``.
        pixels: less than ``H`` and ``W``.

    Returns:
        uint8 ``[B, H, W, C]``.
    """
    padded = jnp.pad(images, ((0, 0), (pixels, pixels), (pixels, pixels), (0, 0)), mode="reflect")
    count = jnp.full(len(images), 2 * pixels + 1, jnp.int32)
    top, left = random_below(uniform[:, 0], count), random_below(uniform[:, 1], count)
    # One slice per image: on a CPU as fast as selects between slices of the batch, and faster for large shifts.
    crop = jax.vmap(lambda image, top, left: jax.lax.dynamic_slice(image, (top, left, jnp.int32(0)), images.shape[1:]))
    return crop(padded, top, left)
