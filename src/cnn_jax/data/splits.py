"""The test split of data that is published without one."""

import numpy as np

from cnn_jax.data.dataset import Split
from cnn_jax.errors import UsageError

TEST_SHARE = 0.2


def hold_out(images: np.ndarray, labels: np.ndarray) -> tuple[Split, Split]:
    """Four fifths for training and one fifth for testing, in every class alike, the same at every call.

    Args:
        images: uint8 ``[N, H, W, C]``.
        labels: int32 ``[N]``.

    Returns:
        The training split and the test split.

    Raises:
        UsageError: too few examples to have every class in both.
    """
    from sklearn.model_selection import train_test_split

    try:
        train_images, test_images, train_labels, test_labels = train_test_split(
            images, labels, test_size=TEST_SHARE, random_state=0, stratify=labels
        )
    except ValueError as error:
        raise UsageError(f"too few examples to hold a test split out of them: {error}") from None
    return Split(train_images, train_labels), Split(test_images, test_labels)


def hold_out_of_each_class(images: np.ndarray, labels: np.ndarray, seed: int) -> tuple[Split, Split]:
    """A fifth of every class for testing, but at least one example, and the rest for training, both in random order.

    Unlike ``hold_out`` it leaves no class out of the test split, however few examples it has beside the others.

    Args:
        images: uint8 ``[N, H, W, C]``.
        labels: int32 ``[N]``, of each class at least two.
        seed: determines which examples are held out, and the order.

    Returns:
        The training split and the test split.
    """
    order = np.random.default_rng(seed).permutation(len(labels))
    held_out = np.zeros(len(labels), bool)
    for label in np.unique(labels):
        members = order[labels[order] == label]
        held_out[members[: max(1, round(TEST_SHARE * len(members)))]] = True
    train, test = order[~held_out[order]], order[held_out[order]]
    return Split(images[train], labels[train]), Split(images[test], labels[test])
