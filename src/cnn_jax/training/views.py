"""Views of an image whose predictions are averaged: test-time augmentation."""

from typing import Literal, get_args

import jax
import jax.numpy as jnp

from cnn_jax.errors import UsageError, suggest

TestTimeAugmentation = Literal["none", "flip", "multicrop"]
"""The views of an image whose predictions are averaged."""


def views(images: jax.Array, tta: TestTimeAugmentation) -> tuple[jax.Array, tuple[float, ...]]:
    """Views of each image; the prediction is the weighted mean of those of the views.

    Args:
        images: uint8 ``[B, H, W, C]``.
        tta: ``"none"`` is the image itself, ``"flip"`` the image and its mirror image. ``"multicrop"`` is airbench's
            (https://arxiv.org/abs/2404.00498): both of these, and both shifted by one pixel down and right and up and
            left, filled by reflection; the unshifted views have half of the weight.

    Returns:
        uint8 ``[V, B, H, W, C]``, and the weights of the V views, which add up to 1.

    Raises:
        UsageError: unknown ``tta``, or images too small for it.
    """
    known = get_args(TestTimeAugmentation)
    if tta not in known:
        raise UsageError(f"unknown tta {tta!r}{suggest(tta, known)}; choices: {', '.join(known)}")
    images = jnp.asarray(images)
    if tta == "none":
        return images[jnp.newaxis], (1.0,)
    crops, weights = [images], (0.5, 0.5)
    if tta == "multicrop":
        height, width = images.shape[1:3]
        if min(height, width) < 2:
            raise UsageError(f"tta multicrop needs at least 2x2 pixels, the images have {height}x{width}: use flip")
        # jnp.pad would do, but in jax 0.7 not for a symbolic number of images.
        padded = jnp.concatenate([images[:, 1:2], images, images[:, -2:-1]], axis=1)
        padded = jnp.concatenate([padded[:, :, 1:2], padded, padded[:, :, -2:-1]], axis=2)
        crops += [padded[:, :height, :width], padded[:, 2:, 2:]]
        weights = (0.25, 0.25, *(0.125,) * 4)
    return jnp.stack([view for crop in crops for view in (crop, crop[:, :, ::-1])]), weights
