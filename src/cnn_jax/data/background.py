"""Background brightness: dark in MNIST and its relatives, light in a photograph of ink on paper."""

import numpy as np

from cnn_jax.data.streamed import Images

DARK = 64
"""Brightness below which a background is dark."""

LIGHT = 128
"""Brightness from which a background is light."""


def is_dark(images: Images) -> bool:
    """Whether more than 90 % of the images ``[N, H, W, C]`` have a dark background, as MNIST's do."""
    sample = images[:: 1 + len(images) // 1000]  # spread over the whole dataset, which may be sorted
    return bool(np.mean([_border_brightness(image) < DARK for image in sample]) > 0.9)


def is_light(image: np.ndarray) -> bool:
    """Whether an image ``[H, W, C]`` has a light background, as a photograph of ink on paper does."""
    return bool(_border_brightness(image) >= LIGHT)


def color(image: np.ndarray) -> np.ndarray:
    """The background color of an image ``[H, W, C]``, uint8 ``[C]``: the median of its border in each channel."""
    return np.median(_border(image), axis=0).astype(np.uint8)


def _border_brightness(image: np.ndarray) -> float:
    """The median of the border, whatever objects cover less than half of it."""
    return float(np.median(_border(image)))


def _border(image: np.ndarray) -> np.ndarray:
    """The outermost pixels of an image ``[H, W, C]``, ``[P, C]``."""
    inner = np.zeros(image.shape[:2], bool)
    inner[1:-1, 1:-1] = True
    return image[~inner]
