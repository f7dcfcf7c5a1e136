"""What lies around the things in pictures: dark in MNIST's family, light in a photograph of ink on paper."""

import numpy as np

DARK = 64
LIGHT = 128


def is_dark(images: np.ndarray) -> bool:
    """Whether almost all of the images ``[N, H, W, C]`` show something on a dark ground, as MNIST's do."""
    some = images[:: 1 + len(images) // 1000]  # from all over the data set, whatever its order
    return bool(np.mean(_border_brightness(some) < DARK) > 0.9)


def is_light(image: np.ndarray) -> bool:
    """Whether an image ``[H, W, C]`` shows something on a light ground, as a photograph of ink on paper does."""
    return bool(_border_brightness(image[np.newaxis])[0] >= LIGHT)


def _border_brightness(images: np.ndarray) -> np.ndarray:
    """The median over the outermost pixels of each image: no thing that fills less than half of the border moves it."""
    inner = np.zeros(images.shape[1:3], bool)
    inner[1:-1, 1:-1] = True
    return np.median(images[:, ~inner], axis=(1, 2))
