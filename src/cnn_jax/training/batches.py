"""How many images to classify at a time, so that the memory this takes depends little on their size."""

import math

MAX_IMAGES = 256
"""Images in a batch; more of the smallest images are no faster."""

MAX_BYTES = 1 << 20
"""Bytes of pixels in a batch of more than one image. The forward pass takes about 60 times as much on a CPU."""


def batch_size_for(image_shape: tuple[int, int, int], num_images: int) -> int:
    """The batch size to classify that many images with.

    A power of two, so that a program is compiled for few different batch sizes.

    Args:
        image_shape: ``(H, W, C)`` of the uint8 images.
        num_images: how many there are; the batch is hardly larger.

    Returns:
        From 1 to ``MAX_IMAGES``.
    """
    most = max(1, min(MAX_IMAGES, MAX_BYTES // math.prod(image_shape)))
    most = 1 << (most.bit_length() - 1)
    return min(most, 1 << (max(1, num_images) - 1).bit_length())
