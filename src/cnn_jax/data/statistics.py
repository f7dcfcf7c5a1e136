"""Statistics of images."""

import math

import numpy as np

from cnn_jax.data.streamed import Images, StreamedImages

BLOCK = 1 << 17
"""Number of pixel values converted to float64 at a time."""


def mean_and_std(images: Images) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """The mean and the standard deviation of each channel, of values scaled to [0, 1].

    Args:
        images: uint8 ``[N, H, W, C]``.

    Returns:
        The means and the standard deviations, one for each channel; 1 instead of a standard deviation of 0.
    """
    total, squares = images.channel_sums if isinstance(images, StreamedImages) else channel_sums(images)
    num_pixels = math.prod(images.shape[:3])
    mean = total / num_pixels
    std = np.sqrt(np.maximum(squares / num_pixels - mean**2, 0))
    return tuple((mean / 255).tolist()), tuple(np.where(std > 0, std / 255, 1.0).tolist())


def channel_sums(images: np.ndarray) -> np.ndarray:
    """The sums of the values and of their squares, exact for up to 10^11 pixels.

    Args:
        images: uint8 ``[..., C]``.

    Returns:
        uint64 ``[2, C]``.
    """
    pixels = images.reshape(-1, images.shape[-1])
    rows = max(1, BLOCK // images.shape[-1])
    sums = np.zeros((2, images.shape[-1]))
    for start in range(0, len(pixels), rows):
        block = pixels[start : start + rows].astype(np.float64)  # integers, so that their sums are exact
        sums += block.sum(axis=0), np.einsum("nc,nc->c", block, block)
    return sums.astype(np.uint64)
