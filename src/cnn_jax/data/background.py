"""Background brightness: dark in MNIST and its relatives, light in a photograph of ink on paper."""

import numpy as np

DARK = 64
"""Brightness below which a background is dark."""

LIGHT = 128
"""Brightness from which a background is light."""


def is_dark(images: np.ndarray) -> bool:
    """Whether more than 90 % of the images ``[N, H, W, C]`` have a dark background, as MNIST's do."""
    sample = images[:: 1 + len(images) // 1000]  # spread over the whole dataset, which may be sorted
    return bool(np.mean(_border_brightness(sample) < DARK) > 0.9)


def is_light(image: np.ndarray) -> bool:
    """Whether an image ``[H, W, C]`` has a light background, as a photograph of ink on paper does."""
    return bool(_border_brightness(image[np.newaxis])[0] >= LIGHT)


def color(image: np.ndarray) -> np.ndarray:
    """The background color of an image ``[H, W, C]``, uint8 ``[C]``: the median of its border in each channel."""
    return np.median(_border(image[np.newaxis])[0], axis=0).astype(np.uint8)


def _border_brightness(images: np.ndarray) -> np.ndarray:
    """The median of the border of each image, whatever objects cover less than half of it."""
    return np.median(_border(images), axis=(1, 2))


def _border(images: np.ndarray) -> np.ndarray:
    """The outermost pixels of each image, ``[N, P, C]``."""
    inner = np.zeros(images.shape[1:3], bool)
    inner[1:-1, 1:-1] = True
    return images[:, ~inner]
