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
