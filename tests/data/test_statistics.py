import os

import numpy as np
import pytest

from cnn_jax.config import Config
from cnn_jax.data import load
from cnn_jax.data.statistics import BLOCK, mean_and_std


@pytest.mark.parametrize("shape", [(5, 4, 3, 1), (BLOCK // 100 + 1, 10, 10, 3)])
def test_they_are_numpys(shape):
    images = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    mean, std = mean_and_std(images)
    np.testing.assert_allclose(mean, (images / 255).mean(axis=(0, 1, 2)), rtol=1e-12)
    np.testing.assert_allclose(std, (images / 255).std(axis=(0, 1, 2)), rtol=1e-12)


def test_a_constant_channel_is_not_divided_by_zero():
    mean, std = mean_and_std(np.full((3, 2, 2, 1), 51, np.uint8))
    assert (mean, std) == ((pytest.approx(0.2),), (1.0,))


@pytest.mark.skipif("CNN_JAX_DATA_DIR" not in os.environ, reason="CNN_JAX_DATA_DIR is not set")
def test_fashion_mnists_are_the_published_ones():
    """0.2860 and 0.3530 are those that PyTorch examples pass to ``transforms.Normalize``."""
    mean, std = mean_and_std(load(Config(dataset="fashion_mnist")).train.images)
    assert (round(mean[0], 4), round(std[0], 4)) == (0.2860, 0.3530)
