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


def _border_brightness(images: np.ndarray) -> np.ndarray:
    """The median of the outermost pixels of each image, whatever objects cover less than half of the border."""
    inner = np.zeros(images.shape[1:3], bool)
    inner[1:-1, 1:-1] = True
    return np.median(images[:, ~inner], axis=(1, 2))
