"""Batch sizes: bounded by the number of images and by their bytes."""

import math

import pytest

from cnn_jax.training.evaluation import MAX_BATCH, MAX_BATCH_BYTES, batch_size_for


@pytest.mark.parametrize(
    ("image_shape", "num_images", "batch_size"),
    [
        ((28, 28, 1), 0, 1),
        ((28, 28, 1), 1, 1),
        ((28, 28, 1), 2, 2),
        ((28, 28, 1), 3, 4),
        ((28, 28, 1), 129, 256),
        ((28, 28, 1), 10_000, 256),
        ((64, 64, 3), 10_000, 64),
        ((224, 224, 3), 1, 1),
        ((224, 224, 3), 10_000, 4),
        ((800, 800, 3), 10_000, 1),
        ((8000, 8000, 3), 10_000, 1),
    ],
)
def test_the_batch_size(image_shape, num_images, batch_size):
    assert batch_size_for(image_shape, num_images) == batch_size


@pytest.mark.parametrize("side", [1, 16, 28, 63, 64, 65, 100, 224, 512, 1000])
def test_within_every_bound(side):
    for num_images in (*range(1, 40), 255, 256, 257, 1000):
        shape = (side, side, 3)
        batch_size = batch_size_for(shape, num_images)
        assert batch_size.bit_count() == 1
        assert batch_size <= MAX_BATCH
        assert batch_size == 1 or batch_size < 2 * num_images
        assert batch_size == 1 or batch_size * math.prod(shape) <= MAX_BATCH_BYTES
