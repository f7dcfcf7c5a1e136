import jax
import numpy as np

from cnn_jax.training.task import SCALE, Normalize

IMAGES = np.random.default_rng(0).integers(0, 256, (2, 4, 4, 3), np.uint8)


def test_scaling_alone_is_the_lessons_division():
    np.testing.assert_array_equal(SCALE(IMAGES), IMAGES.astype(np.float32) / np.float32(255))


def test_each_channel_is_standardized():
    mean, std = (0.1, 0.5, 0.9), (0.2, 0.3, 1.0)
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        inputs = Normalize(mean, std)(IMAGES)
    assert inputs.dtype == np.float32
    np.testing.assert_allclose(inputs, (IMAGES / 255 - mean) / std, rtol=1e-5, atol=1e-6)
