import numpy as np
import pytest

from cnn_jax.data.shuffle import epoch_order


def test_a_permutation():
    order = epoch_order(1000, seed=3, epoch=7, shuffle=True)
    assert order.dtype == np.int32
    np.testing.assert_array_equal(np.sort(order), np.arange(1000))
    # Expected fixed points: 1.
    assert np.sum(order == np.arange(1000)) < 10


def test_pure():
    first = epoch_order(1000, 3, 7, True)
    np.random.seed(0)
    first_again = epoch_order(1000, 3, 7, True)
    np.testing.assert_array_equal(first, first_again)


def test_same_on_every_supported_version():
    assert epoch_order(10, 3, 7, True).tolist() == [3, 4, 2, 6, 1, 9, 7, 0, 8, 5]


@pytest.mark.parametrize(("seed", "epoch"), [(3, 8), (4, 7), (7, 3), (0, 0), (2**32 - 1, 7)])
def test_another_order_for_another_epoch_or_seed(seed, epoch):
    assert np.sum(epoch_order(1000, seed, epoch, True) == epoch_order(1000, 3, 7, True)) < 10


def test_as_stored_without_shuffling():
    order = epoch_order(5, seed=3, epoch=7, shuffle=False)
    assert order.dtype == np.int32
    assert order.tolist() == [0, 1, 2, 3, 4]
