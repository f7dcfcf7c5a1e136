"""Statistics of images."""

import numpy as np

BLOCK = 1 << 17
"""Number of pixel values converted to float64 at a time."""


def mean_and_std(images: np.ndarray) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """The mean and the standard deviation of each channel, of values scaled to [0, 1].

    Args:
        images: uint8 ``[N, H, W, C]``.

    Returns:
        The means and the standard deviations, one for each channel; 1 instead of a standard deviation of 0.
    """
    pixels = images.reshape(-1, images.shape[-1])
    rows = max(1, BLOCK // images.shape[-1])
    total, squares = np.zeros((2, images.shape[-1]))
    for start in range(0, len(pixels), rows):
        block = pixels[start : start + rows].astype(np.float64)  # sums of integers, so they are exact
        total += block.sum(axis=0)
        squares += np.einsum("nc,nc->c", block, block)
    mean = total / len(pixels)
    std = np.sqrt(np.maximum(squares / len(pixels) - mean**2, 0))
    return tuple((mean / 255).tolist()), tuple(np.where(std > 0, std / 255, 1.0).tolist())
