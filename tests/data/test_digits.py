import hashlib

import numpy as np
import pytest
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from cnn_jax.data import digits


@pytest.fixture(scope="module")
def dataset():
    return digits.load()


def test_shapes(dataset):
    assert dataset.name == "digits"
    assert dataset.class_names == tuple("0123456789")
    assert dataset.train.images.shape == (1437, 28, 28, 1)
    assert dataset.test.images.shape == (360, 28, 28, 1)
    for split in (dataset.train, dataset.test):
        assert split.images.dtype == np.uint8
        assert split.labels.dtype == np.int32
        assert (split.images.min(), split.images.max()) == (0, 255)


def test_split_is_stratified(dataset):
    stored = np.bincount(load_digits().target)
    held_out = np.bincount(dataset.test.labels)
    np.testing.assert_allclose(held_out, stored / 5, atol=1)
    np.testing.assert_array_equal(held_out + np.bincount(dataset.train.labels), stored)


def test_against_scikit_learn(dataset):
    stored = load_digits()
    expected = train_test_split(stored.images, stored.target, test_size=0.2, random_state=0, stratify=stored.target)
    for split, images, labels in zip((dataset.train, dataset.test), expected[:2], expected[2:], strict=True):
        np.testing.assert_array_equal(split.labels, labels)
        # Each of the 8x8 pixels became 3.5x3.5: the one at its middle is near what was stored.
        middles = np.round(np.arange(8) * 3.5 + 1.25).astype(int)
        kept = split.images[:, middles][:, :, middles, 0].astype(float)
        assert np.corrcoef(kept.ravel(), images.ravel())[0, 1] > 0.99
        np.testing.assert_allclose(split.images.mean() / 255, images.mean() / 16, rtol=0.02)


def test_same_again(dataset):
    again = digits.load()
    for split in ("train", "test"):
        np.testing.assert_array_equal(getattr(again, split).images, getattr(dataset, split).images)
        np.testing.assert_array_equal(getattr(again, split).labels, getattr(dataset, split).labels)


def test_same_on_every_supported_version(dataset):
    assert dataset.train.labels[:12].tolist() == [3, 9, 1, 3, 1, 9, 4, 4, 2, 8, 3, 5]
    assert dataset.test.labels[:12].tolist() == [7, 6, 3, 7, 7, 3, 2, 8, 9, 3, 2, 6]
    assert hashlib.sha256(dataset.test.images.tobytes()).hexdigest().startswith("a04fdfd375b22d74")
