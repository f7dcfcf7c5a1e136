"""Random changes of color."""

import jax
import jax.numpy as jnp

from cnn_jax.training.augment.arithmetic import between, to_uint8

GRAY_WEIGHTS = (0.299, 0.587, 0.114)
"""Red, green and blue in the gray value, from ITU-R BT.601: https://www.itu.int/rec/R-REC-BT.601."""


def color_jitter(images: jax.Array, uniform: jax.Array, strength: float) -> jax.Array:
    """Change brightness, contrast and saturation, each by a random factor; see ``adjust_color``.

    The factors are uniform from ``max(0, 1 - strength)`` to ``1 + strength``, as in torchvision's
    ``ColorJitter(strength, strength, strength)``. Unlike there, the order is fixed. There is no change of hue, which
    costs a conversion to HSV and back.

    Args:
        images: uint8 ``[B, H, W, C]`` with 1 or 3 channels.
        uniform: random numbers ``[B, 3]``.
        strength: at least 0.

    Returns:
        uint8 ``[B, H, W, C]``.
    """
    factors = between(uniform, max(0.0, 1 - strength), 1 + strength)
    return adjust_color(images, factors[:, 0], factors[:, 1], factors[:, 2])


def adjust_color(images: jax.Array, brightness: jax.Array, contrast: jax.Array, saturation: jax.Array) -> jax.Array:
    """Scale brightness, then contrast, then saturation.

    Each blends the image with another, ``factor * image + (1 - factor) * other``, and limits the result to [0, 255], as
    torchvision's ``adjust_brightness``, ``adjust_contrast`` and ``adjust_saturation``: with black, with the mean of the
    image's gray values, and with its gray values (``GRAY_WEIGHTS``). Saturation leaves images of one channel as they
    are. Values are rounded once at the end, to the nearest, while torchvision rounds down after each operation.

    Args:
        images: uint8 ``[B, H, W, C]`` with 1 or 3 channels.
        brightness: float32 ``[B]``, at least 0.
        contrast: float32 ``[B]``, at least 0.
        saturation: float32 ``[B]``, at least 0.

    Returns:
        uint8 ``[B, H, W, C]``.
    """

    # Whole planes for each channel: on a CPU several times as fast as with the channels of a pixel side by side.
    planes = jnp.moveaxis(images, 3, 0).reshape(images.shape[3], len(images), -1)
    planes = jax.lax.optimization_barrier(planes).astype(jnp.float32)

    def gray(planes: jax.Array) -> jax.Array:
        if len(planes) == 1:
            return planes
        red, green, blue = (plane * weight for plane, weight in zip(planes, GRAY_WEIGHTS, strict=True))
        return (red + green + blue)[jnp.newaxis]

    def blend(planes: jax.Array, other: jax.Array | float, factor: jax.Array) -> jax.Array:
        factor = factor.reshape(1, -1, 1)
        return jnp.clip(factor * planes + (1 - factor) * other, 0, 255)

    planes = blend(planes, 0.0, brightness)
    planes = blend(planes, gray(planes).mean(axis=2, keepdims=True), contrast)
    if len(planes) > 1:
        planes = blend(planes, gray(planes), saturation)
    planes = jax.lax.optimization_barrier(to_uint8(planes))
    return jnp.moveaxis(planes, 0, 2).reshape(images.shape)
